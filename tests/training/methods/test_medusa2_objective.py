from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heads.medusa import MedusaConfig, MedusaHeads
from server.model.loading import LoadedModel, load_model
from tests.training.corpora import corpus, document
from training.data.batches import DocumentBatch
from training.data.dataset import Document
from training.methods.lora import ALL_LINEAR, AdaptedBase, LoraPlan
from training.methods.medusa2_objective import Medusa2Module, Medusa2Objective
from training.states.hidden_states import HiddenStateEncoder

K = 3


class Setting:
    """Heads and an adapted base with weights of their own."""

    def __init__(self, model_dir: Path, draft_vocab_size: int | None = 150) -> None:
        self.loaded: LoadedModel = load_model(str(model_dir), "cpu", "float32")
        encoder = HiddenStateEncoder(self.loaded, max_batch_tokens=64)
        self.base = AdaptedBase(self.loaded, LoraPlan(4, 8.0, (ALL_LINEAR,), 0))
        unembedding_VD = self.loaded.unembedding()
        config = MedusaConfig(
            self.loaded.hidden_size, len(unembedding_VD), K, draft_vocab_size=draft_vocab_size
        )
        ids_U = None if draft_vocab_size is None else torch.arange(3, 3 + draft_vocab_size)
        self.heads = MedusaHeads(config, unembedding_VD, self.loaded.input_embedding(), ids_U)
        self.objective = Medusa2Objective(
            self.heads, self.base, encoder, unembedding_VD, torch.float32
        )

    def disturb(self) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in (*self.heads.parameters(), *self.base.parameters.values()):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)

    def hidden(self, doc: Document) -> Tensor:
        """Last hidden states TD of a document alone."""
        decoder = self.loaded.model.base_model
        states_TD: Tensor = decoder(input_ids=doc.token_ids_T.unsqueeze(0)).last_hidden_state[0]
        return states_TD

    def losses_slowly(self, documents: tuple[Document, ...]) -> Tensor:
        """One document, position and head at a time, by torch's own losses; K + 1."""
        index = {token: i for i, token in enumerate(self.heads.draft_vocab_ids.tolist())}
        sums = [torch.zeros(()) for _ in range(K + 1)]
        for doc in documents:
            adapted_TD = self.hidden(doc)
            with self.base.without(), torch.no_grad():
                plain_TD = self.hidden(doc)
            for span in doc.spans:
                for position in range(span.start, span.end):
                    states = (adapted_TD[position - 1], plain_TD[position - 1])
                    ours_V, theirs_V = (
                        (state_D @ self.loaded.unembedding().T).log_softmax(dim=0)
                        for state_D in states
                    )
                    sums[K] = sums[K] + F.kl_div(ours_V, theirs_V, reduction="sum", log_target=True)
                    root_1 = doc.token_ids_T[position : position + 1]
                    logits_K1U = self.heads.draft_logits(self.heads(states[0][None], root_1))
                    for head in range(K):
                        at = position + 1 + head
                        if at < span.end and int(doc.token_ids_T[at]) in index:
                            label = torch.tensor([index[int(doc.token_ids_T[at])]])
                            sums[head] = sums[head] + F.cross_entropy(logits_K1U[head], label)
        return torch.stack(sums)


def gradients(setting: Setting, losses: Tensor) -> list[Tensor]:
    parameters = [*setting.heads.parameters(), *setting.base.parameters.values()]
    weights = 1.0 / torch.arange(1, len(losses) + 1)
    return list(torch.autograd.grad((weights * losses).sum(), parameters))


@pytest.mark.parametrize("draft_vocab_size", [150, None])
def test_losses_and_gradients_are_those_of_the_definition(
    model_dir: Path, draft_vocab_size: int | None
) -> None:
    setting = Setting(model_dir, draft_vocab_size)
    setting.disturb()
    documents = (*corpus(4).documents, document(9, (4, 5), (6, 9), seed=7))
    found = setting.objective(DocumentBatch(documents))
    expected = setting.losses_slowly(documents)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert float(found[K].detach()) > 0.1
    pairs = zip(gradients(setting, found), gradients(setting, expected), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def test_labels_are_counted_without_a_forward_pass(model_dir: Path) -> None:
    setting = Setting(model_dir, None)
    first, second = document(12, (4, 10)), document(9, (2, 3), (5, 9))
    setting.loaded.model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    # Spans of 6, 1 and 4 tokens: one label less for each head, and every token diverges.
    assert setting.objective.num_labels(DocumentBatch((first, second))).tolist() == [8, 6, 4, 11]


def test_an_adapter_without_effect_does_not_diverge(model_dir: Path) -> None:
    setting = Setting(model_dir)
    losses = setting.objective(DocumentBatch(corpus(3).documents)).detach()
    assert float(losses[K]) == pytest.approx(0.0, abs=1e-4)


def test_the_module_holds_what_learns_and_nothing_else(model_dir: Path) -> None:
    setting = Setting(model_dir)
    found = {id(weight) for weight in Medusa2Module(setting.heads, setting.base).parameters()}
    expected = (*setting.heads.parameters(), *setting.base.parameters.values())
    assert found == {id(weight) for weight in expected}


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
def test_the_parts_of_a_batch_are_its_documents_in_order(num_parts: int) -> None:
    batch = DocumentBatch(corpus(5).documents)
    parts = batch.divide(num_parts)
    assert len(parts) == num_parts
    assert tuple(doc for part in parts for doc in part.documents) == batch.documents
    sizes = [len(part.documents) for part in parts]
    assert max(sizes) - min(sizes) <= 1
