from pathlib import Path

import pytest
import torch
from torch import Tensor

from heads.mtp import MTPConfig, MTPModule
from server.attention.hook import AttentionContext
from server.model.decoder_layer import DecoderLayer
from server.model.loading import LoadedModel, load_model
from tests.support.tiny_models import save_tiny_model
from training.data.dataset import NO_LABEL, Document, Span
from training.methods.mtp_unroll import unroll
from training.methods.unrolled_attention import Unroll, UnrolledAttention
from training.states.encoded import EncodedDocument

NUM_DEPTHS = 4


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory: Path = tmp_path_factory.mktemp("mtp") / "model"
    save_tiny_model(request.param, directory, 0)
    return load_model(str(directory), "cpu", "float32")


def made(loaded: LoadedModel) -> tuple[MTPModule, DecoderLayer]:
    torch.manual_seed(0)
    layer = DecoderLayer(loaded.model)
    config = MTPConfig(loaded.hidden_size, loaded.vocab_size, 40)
    module = MTPModule(
        config, layer.module, loaded.unembedding(), loaded.input_embedding(), torch.arange(40)
    )
    with torch.no_grad():
        module.projection.weight.normal_(std=0.3)
    return module, layer


def documents(width: int) -> list[EncodedDocument]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for length, spans in (
        (20, (Span(5, 12), Span(15, 20))),
        (9, (Span(4, 9),)),
        (6, (Span(5, 6),)),
    ):
        tokens = torch.randint(0, 300, (length,), generator=generator)
        hidden = torch.randn(length - 1, width, generator=generator)
        found.append(EncodedDocument(Document("id", "", tokens, spans), hidden))
    return found


def decoded(
    module: MTPModule, layer: DecoderLayer, item: EncodedDocument, root: int, depth: int
) -> Tensor:
    """The state of one draft, as decoding gets it: one causal pass over all tokens per depth."""
    states = torch.cat((torch.zeros(1, item.hidden_XD.shape[1]), item.hidden_XD[:root]))
    for _ in range(depth):
        positions = torch.arange(len(states))
        memory = Unroll()
        memory.begin_depth([positions])
        context = AttentionContext(UnrolledAttention(), memory)
        tokens = item.document.token_ids_T[positions]
        output: Tensor = module(states, tokens, layer.runner(positions, context))
        states = torch.cat((states, output[-1:]))
    return output[-1]


def test_every_draft_is_what_decoding_step_by_step_gives(loaded: LoadedModel) -> None:
    module, layer = made(loaded)
    batch = documents(loaded.hidden_size)
    num_checked = 0
    with torch.no_grad():
        for index, output in enumerate(unroll(module, layer, batch, NUM_DEPTHS)):
            states = torch.split(output.states_TD, [len(at) for at in output.positions])
            for item, rows, at in zip(batch, states, output.positions, strict=True):
                for state, position in zip(rows, at.tolist(), strict=True):
                    expected = decoded(module, layer, item, position - index, index + 1)
                    # Norms of small vectors blow float noise up; a wrong key shows at 0.1.
                    assert torch.allclose(state, expected, atol=1e-3)
                    num_checked += 1
    assert num_checked > 40


def test_every_token_is_a_key_and_nothing_is_before_the_first(loaded: LoadedModel) -> None:
    module, layer = made(loaded)
    seen: list[Tensor] = []
    handle = module.hidden_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = documents(loaded.hidden_size)[1:2]
    with torch.no_grad():
        first = next(unroll(module, layer, batch, 1))
    handle.remove()
    assert torch.equal(first.positions[0], torch.arange(9))
    assert torch.equal(seen[0][0], torch.zeros(loaded.hidden_size))
    assert torch.equal(seen[0][1:], batch[0].hidden_XD)


def test_labels_are_answer_tokens_whose_root_is_in_the_same_answer(loaded: LoadedModel) -> None:
    module, layer = made(loaded)
    batch = documents(loaded.hidden_size)
    for index, output in enumerate(unroll(module, layer, batch, NUM_DEPTHS)):
        expected = []
        for item, at in zip(batch, output.positions, strict=True):
            tokens = item.document.token_ids_T.tolist()
            for position in at.tolist():
                is_learnt = any(
                    span.start <= position - index and position + 1 < span.end
                    for span in item.document.spans
                )
                expected.append(tokens[position + 1] if is_learnt else NO_LABEL)
        assert output.labels_T.tolist() == expected
        num_drafts = sum(
            max(0, span.end - span.start - 1 - index)
            for item in batch
            for span in item.document.spans
        )
        assert int((output.labels_T != NO_LABEL).sum()) == num_drafts


def test_later_depths_train_earlier_ones(loaded: LoadedModel) -> None:
    module, layer = made(loaded)
    *_, last = unroll(module, layer, documents(loaded.hidden_size), 3)
    weight = module.embedding_norm.weight
    (gradient,) = torch.autograd.grad(last.states_TD.square().sum(), [weight])
    assert bool(gradient.any())
