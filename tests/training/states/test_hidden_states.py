from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig

from server.errors import ModelError
from server.model.loading import LoadedModel, load_model
from tests.support.tiny_models import (
    MAX_MODEL_LEN,
    TINY_KINDS,
    TinyKind,
    save_tiny_model,
    tiny_config,
    tiny_tokenizer,
)
from tests.training.corpora import corpus, document
from training.data.dataset import Document
from training.states.hidden_states import HiddenStateEncoder


def hidden_states_slowly(loaded: LoadedModel, doc: Document) -> Tensor:
    """What the unembedding sees, one document at a time, each prefix on its own."""
    seen: list[Tensor] = []
    unembedding = loaded.model.get_output_embeddings()
    handle = unembedding.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    with torch.no_grad():
        for root in doc.roots().tolist():
            loaded.model(input_ids=doc.token_ids_T[:root].unsqueeze(0), use_cache=False)
    handle.remove()
    return torch.stack(seen)


def test_all_hidden_states_hold_those_of_the_roots(encoder: HiddenStateEncoder) -> None:
    documents = corpus(6).documents
    for doc, all_XD, hidden_ND in zip(
        documents, encoder.encode_all(documents), encoder.encode(documents), strict=True
    ):
        assert len(all_XD) == len(doc.token_ids_T) - 1
        assert torch.equal(all_XD[doc.roots() - 1], hidden_ND)
    with pytest.raises(ModelError, match="'big' has"):
        encoder.encode_all([document(MAX_MODEL_LEN + 1, (2, 8), name="big")])


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_hidden_states_are_those_that_the_roots_were_drawn_from(
    kind: TinyKind, tmp_path: Path
) -> None:
    model = load_model(str(save_tiny_model(kind, tmp_path)), "cpu", "float32")
    encoder = HiddenStateEncoder(model, max_batch_tokens=48)
    documents = corpus(6).documents
    for doc, hidden_ND in zip(documents, encoder.encode(documents), strict=True):
        expected_ND = hidden_states_slowly(model, doc)
        torch.testing.assert_close(hidden_ND, expected_ND, rtol=1e-3, atol=1e-4)


def test_neighbours_and_padding_change_nothing(loaded: LoadedModel) -> None:
    documents = [document(length, (3, length), seed=length) for length in (5, 40, 9, 23, 40, 11)]
    together = HiddenStateEncoder(loaded, max_batch_tokens=10_000).encode(documents)
    alone = HiddenStateEncoder(loaded, max_batch_tokens=1).encode(documents)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_document_without_examples_gives_no_rows(encoder: HiddenStateEncoder) -> None:
    first, second = encoder.encode([document(8, (5, 6)), document(8, (5, 8))])
    assert len(first) == 0
    assert len(second) == 2


def test_no_gradient_is_kept(encoder: HiddenStateEncoder) -> None:
    (hidden_ND,) = encoder.encode([document(8, (2, 8))])
    assert not hidden_ND.requires_grad
    assert hidden_ND.dtype == encoder.dtype


def test_a_document_beyond_the_context_is_an_error(
    encoder: HiddenStateEncoder,
) -> None:
    with pytest.raises(ModelError, match=f"'big' has {MAX_MODEL_LEN + 1} tokens"):
        encoder.encode([document(MAX_MODEL_LEN + 1, (2, 8), name="big")])


def test_a_model_that_changes_hidden_states_before_its_unembedding_is_an_error(
    tmp_path: Path,
) -> None:
    model = load_model(str(save_tiny_model("llama", tmp_path)), "cpu", "float32")
    unembedding = model.model.get_output_embeddings()
    unembedding.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    with pytest.raises(ModelError, match="changes its last hidden states"):
        HiddenStateEncoder(model)


def test_states_of_all_answer_tokens_can_be_asked_for(
    loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    doc = document(20, (4, 5), (9, 14))
    (hidden_ND,) = encoder.encode_answers([doc])
    with torch.no_grad():
        states_TD = loaded.model.base_model(input_ids=doc.token_ids_T.unsqueeze(0))[0][0]
    expected_ND = states_TD[[3, 8, 9, 10, 11, 12]]
    torch.testing.assert_close(hidden_ND, expected_ND, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("scaling", "is_plain"), [(1.0, True), (8.0, False)])
def test_logits_that_are_no_plain_product_are_noticed(
    tmp_path: Path, scaling: float, is_plain: bool
) -> None:
    config = GraniteConfig(**tiny_config("llama").to_dict() | {"logits_scaling": scaling})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    encoder = HiddenStateEncoder(load_model(str(tmp_path), "cpu", "float32"))
    assert encoder.has_plain_logits is is_plain
