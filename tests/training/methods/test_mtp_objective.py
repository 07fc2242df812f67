import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heads.mtp import MTPModule
from server.model.decoder_layer import DecoderLayer
from server.model.loading import LoadedModel
from tests.training.corpora import corpus, document
from tests.training.mtp_modules import make_module
from training.data.dataset import Corpus
from training.methods.mtp_objective import MTPObjective
from training.methods.mtp_unroll import unroll
from training.states.encoded import EncodedBatch, EncodedDocument
from training.states.hidden_states import HiddenStateEncoder

K = 3
DRAFT_VOCAB = torch.arange(40, 260)


def encoded(encoder: HiddenStateEncoder, documents: Corpus) -> EncodedBatch:
    states = encoder.encode_all(documents.documents)
    pairs = zip(documents.documents, states, strict=True)
    return EncodedBatch(tuple(EncodedDocument(*pair) for pair in pairs))


def losses_slowly(
    module: MTPModule,
    layer: DecoderLayer,
    batch: EncodedBatch,
    unembedding_VD: Tensor,
    kl_weight: float,
) -> list[list[Tensor]]:
    """For each depth the loss of every label, one document and one label at a time."""
    ids = module.draft_vocab_ids.tolist()
    losses: list[list[Tensor]] = [[] for _ in range(K)]
    for item in batch.documents:
        tokens = item.document.token_ids_T.tolist()
        for index, output in enumerate(unroll(module, layer, [item], K)):
            logits_TU = module.draft_logits(output.states_TD)
            for logits_U, position in zip(logits_TU, output.positions[0].tolist(), strict=True):
                is_learnt = any(
                    span.start <= position - index and position + 1 < span.end
                    for span in item.document.spans
                )
                if is_learnt and tokens[position + 1] in ids:
                    label = torch.tensor(ids.index(tokens[position + 1]))
                    base_V = (item.hidden_XD[position] @ unembedding_VD.T).softmax(0)
                    soft_U = base_V[ids] / base_V[ids].sum()
                    divergence = (soft_U * (soft_U.log() - logits_U.log_softmax(0))).sum()
                    hard = (1 - kl_weight) * F.cross_entropy(logits_U, label)
                    losses[index].append(hard + kl_weight * divergence)
    return losses


@pytest.mark.parametrize("kl_weight", [0.0, 0.4, 1.0])
def test_losses_and_gradients_are_those_of_a_slow_loop(
    loaded: LoadedModel, encoder: HiddenStateEncoder, kl_weight: float
) -> None:
    batch = encoded(encoder, corpus(5))
    (module, layer), (expected_module, expected_layer) = (
        make_module(loaded, DRAFT_VOCAB) for _ in range(2)
    )
    objective = MTPObjective(module, layer, K, torch.float32, kl_weight)
    sums_K = objective(batch)
    torch.autograd.backward(sums_K.sum())
    unembedding_VD = loaded.unembedding()
    losses = losses_slowly(expected_module, expected_layer, batch, unembedding_VD, kl_weight)
    expected_K = torch.stack([torch.stack(of_depth).sum() for of_depth in losses])
    torch.autograd.backward(expected_K.sum())
    torch.testing.assert_close(sums_K, expected_K, rtol=1e-4, atol=1e-3)
    assert objective.num_labels(batch).tolist() == [len(of_depth) for of_depth in losses]
    for ours, theirs in zip(module.parameters(), expected_module.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-2)
        assert ours.grad is not None


@pytest.mark.parametrize("kl_weight", [0.0, 0.4])
def test_parts_of_a_batch_add_up_to_the_whole(
    loaded: LoadedModel, encoder: HiddenStateEncoder, kl_weight: float
) -> None:
    objective = MTPObjective(*make_module(loaded, DRAFT_VOCAB), K, torch.float32, kl_weight)
    whole = encoded(encoder, corpus(6))
    parts = [EncodedBatch(whole.documents[:2]), EncodedBatch(whole.documents[2:])]
    with torch.no_grad():
        sums_K = objective(parts[0]) + objective(parts[1])
        torch.testing.assert_close(sums_K, objective(whole), rtol=1e-4, atol=1e-3)
    num_labels_K = objective.num_labels(parts[0]) + objective.num_labels(parts[1])
    assert torch.equal(num_labels_K, objective.num_labels(whole))


def test_depths_behind_every_answers_end_cost_nothing(
    loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    objective = MTPObjective(*make_module(loaded, torch.arange(320)), K, torch.float32)
    batch = encoded(encoder, Corpus((document(9, (4, 6)), document(7, (5, 7)))))
    sums_K = objective(batch)
    torch.autograd.backward(sums_K.sum())
    assert objective.num_labels(batch).tolist() == [2, 0, 0]
    assert float(sums_K[0].detach()) > 0.0
    assert sums_K[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
@pytest.mark.parametrize("is_cached", [True, False])
def test_bfloat16_products_come_close_and_leave_the_weights_in_float32(
    loaded: LoadedModel, encoder: HiddenStateEncoder, is_cached: bool, kl_weight: float
) -> None:
    batch = encoded(encoder, corpus(5))
    if is_cached:
        halved = (EncodedDocument(d.document, d.hidden_XD.bfloat16()) for d in batch.documents)
        batch = EncodedBatch(tuple(halved))
    module, layer = make_module(loaded, DRAFT_VOCAB)
    exact_K = MTPObjective(module, layer, K, torch.float32, kl_weight)(batch).detach()
    rough_K = MTPObjective(module, layer, K, torch.bfloat16, kl_weight)(batch)
    torch.testing.assert_close(rough_K, exact_K, rtol=0.1, atol=0.0)
    torch.autograd.backward(rough_K.sum())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
