from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.config import DtypeName
from server.errors import ModelError
from server.model.loading import LoadedModel, load_model
from tests.support.tiny_adapters import save_adapted_heads, save_tiny_adapter
from tests.support.tiny_models import MAX_MODEL_LEN, save_tiny_model
from tests.training.corpora import corpus, document
from training.data.batches import BatchPlan
from training.errors import DataError, RunError
from training.states.document_states import DocumentStates
from training.states.encoded import EncodedSource
from training.states.examples import ExampleSource
from training.states.hidden_cache import HiddenCacheOptions, HiddenStateCache
from training.states.hidden_states import HiddenStateEncoder

DOCUMENTS = corpus(9).documents


def made(directory: Path, loaded: LoadedModel, encoder: HiddenStateEncoder) -> HiddenStateCache:
    return HiddenStateCache(DocumentStates(directory, loaded), encoder)


def equal(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def modified(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_states_read_are_those_computed(
    tmp_path: Path, loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    first = made(tmp_path, loaded, encoder)
    again = made(tmp_path, loaded, encoder)
    for cache in (first, again, made(tmp_path, loaded, encoder)):
        assert equal(cache.encode_all(DOCUMENTS), encoder.encode_all(DOCUMENTS))
        assert equal(cache.encode(DOCUMENTS), encoder.encode(DOCUMENTS))
        assert equal(cache.encode_answers(DOCUMENTS), encoder.encode_answers(DOCUMENTS))
        assert cache.dtype == encoder.dtype


def test_what_is_there_is_not_computed_again_in_whatever_order_it_is_asked_for(
    tmp_path: Path, loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    expected = made(tmp_path, loaded, encoder).encode_all(DOCUMENTS)
    before = modified(tmp_path)
    cache = made(tmp_path, loaded, encoder)
    assert cache.missing(DOCUMENTS) == []
    order = [4, 0, 4, 8, 3]
    found = cache.encode_all([DOCUMENTS[i] for i in order])
    assert equal(found, [expected[i] for i in order])
    assert modified(tmp_path) == before


def test_a_document_is_known_by_its_tokens_and_not_by_its_name_or_spans(
    tmp_path: Path, loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    cache = made(tmp_path, loaded, encoder)
    cache.encode([document(12, (3, 8), seed=1)])
    assert cache.missing([document(12, (4, 12), seed=1, name="other", category="y")]) == []
    others = [document(12, (3, 8), seed=2), document(11, (3, 8), seed=1)]
    assert cache.missing([others[0], others[1], others[0]]) == others


def test_only_what_is_missing_is_computed_and_reported(
    tmp_path: Path, loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    cache = made(tmp_path, loaded, encoder)
    counts: list[int] = []
    cache.fill(DOCUMENTS[:4], counts.append)
    cache.fill(DOCUMENTS, counts.append)
    cache.fill(DOCUMENTS, counts.append)
    assert counts == [4, 5]


def test_files_are_of_bounded_size(
    tmp_path: Path,
    loaded: LoadedModel,
    encoder: HiddenStateEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row_bytes = loaded.hidden_size * 4
    monkeypatch.setattr("training.states.document_states._FILE_BYTES", 40 * row_bytes)
    documents = [*DOCUMENTS, document(70, (3, 70), seed=70)]
    cache = made(tmp_path, loaded, encoder)
    counts: list[int] = []
    cache.fill(documents, counts.append)
    assert sum(counts) == len(documents)
    assert len(counts) == len(list(tmp_path.iterdir())) > 4
    sizes = sorted(path.stat().st_size for path in tmp_path.iterdir())
    # A longer document has a file of its own.
    assert sizes[-2] < 41 * row_bytes + 1500
    expected = encoder.encode_all(documents)
    for ours, theirs in zip(cache.encode_all(documents), expected, strict=True):
        # Other neighbours in a forward pass round otherwise.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_a_narrower_type_halves_the_files_and_rounds(
    tmp_path: Path, loaded: LoadedModel, encoder: HiddenStateEncoder, dtype: DtypeName, bits: int
) -> None:
    narrow = HiddenCacheOptions(
        hidden_cache=tmp_path / "narrow", hidden_cache_dtype=dtype
    ).open_cache(encoder, loaded)
    assert narrow is not None
    expected = made(tmp_path / "whole", loaded, encoder).encode_all(DOCUMENTS)
    for ours, whole in zip(narrow.encode_all(DOCUMENTS), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, whole, rtol=2.0**-bits, atol=1e-6)
        assert not torch.equal(ours, whole)
    sizes = [sum(p.stat().st_size for p in (tmp_path / d).iterdir()) for d in ("narrow", "whole")]
    assert sizes[0] < 0.7 * sizes[1]


def test_states_beyond_the_range_of_the_kept_type_are_an_error(
    tmp_path: Path, model_dir: Path
) -> None:
    loaded = load_model(str(model_dir), "cpu", "float32")
    with torch.no_grad():
        loaded.model.base_model.get_parameter("norm.weight").mul_(1e6)
    cache = HiddenStateCache(
        DocumentStates(tmp_path, loaded, "float16"), HiddenStateEncoder(loaded)
    )
    with pytest.raises(ModelError, match=r"'c0' reach .*float16 cannot hold; give --hidden-cache-"):
        cache.encode(DOCUMENTS)
    assert list(tmp_path.iterdir()) == []


def test_other_bases_and_types_are_told_apart_and_share_a_directory(
    tmp_path: Path, loaded: LoadedModel, encoder: HiddenStateEncoder, model_dir: Path
) -> None:
    adapter = save_tiny_adapter(model_dir, tmp_path / "adapter")
    heads = save_adapted_heads(model_dir, tmp_path / "heads", adapter)
    other = save_tiny_model("llama", tmp_path / "other", seed=9)
    directory = tmp_path / "states"
    bases = [
        load_model(str(other), "cpu", "float32"),
        load_model(str(model_dir), "cpu", "bfloat16"),
        load_model(str(model_dir), "cpu", "float32", heads),
        loaded,
    ]
    encoders = [HiddenStateEncoder(base, 64) for base in bases]
    for base, own in zip(bases, encoders, strict=True):
        assert made(directory, base, own).missing(DOCUMENTS) == list(DOCUMENTS)
        made(directory, base, own).fill(DOCUMENTS, lambda _: None)
    narrow = DocumentStates(directory, loaded, "float16")
    assert narrow.missing(DOCUMENTS) == list(DOCUMENTS)
    for base, own in zip(bases, encoders, strict=True):
        assert equal(made(directory, base, own).encode_all(DOCUMENTS), own.encode_all(DOCUMENTS))


def test_damage_is_found_when_states_are_read(
    tmp_path: Path, loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    made(tmp_path, loaded, encoder).fill(DOCUMENTS, lambda _: None)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    cache = made(tmp_path, loaded, encoder)
    with pytest.raises(DataError, match=f"{path.name} is damaged .*remove it and run the same"):
        cache.encode_all(DOCUMENTS)
    path.unlink()
    cache = made(tmp_path, loaded, encoder)
    assert equal(cache.encode_all(DOCUMENTS), encoder.encode_all(DOCUMENTS))


def test_a_document_beyond_the_context_is_an_error_that_names_it(
    tmp_path: Path, loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    big = document(MAX_MODEL_LEN + 1, (2, 8), name="big")
    with pytest.raises(ModelError, match=f"'big' has {MAX_MODEL_LEN + 1} tokens"):
        made(tmp_path, loaded, encoder).encode([big])


@pytest.mark.parametrize("is_cached", [True, False])
def test_the_batches_are_those_without_a_cache(
    tmp_path: Path, loaded: LoadedModel, encoder: HiddenStateEncoder, is_cached: bool
) -> None:
    documents, both = corpus(9), (made(tmp_path, loaded, encoder), encoder)
    plan = BatchPlan(7, 0, is_cached, group_size=4)
    whole = BatchPlan(50, 0, is_cached, group_size=4)
    for _ in range(2):
        examples = (ExampleSource(documents, states, 3, plan).batches(1) for states in both)
        for ours, expected in zip(*examples, strict=True):
            assert torch.equal(ours.roots_N, expected.roots_N)
            assert torch.equal(ours.labels_NK, expected.labels_NK)
            torch.testing.assert_close(ours.hidden_ND, expected.hidden_ND, rtol=1e-4, atol=1e-4)
        encoded = (EncodedSource(documents, states, whole).batches(1) for states in both)
        for batch, other in zip(*encoded, strict=True):
            for a, b in zip(batch.documents, other.documents, strict=True):
                assert a.document is b.document
                torch.testing.assert_close(a.hidden_XD, b.hidden_XD, rtol=2**-7, atol=1e-4)


def test_no_cache_is_opened_unasked_and_none_for_a_type_alone(
    loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    assert HiddenCacheOptions().open_cache(encoder, loaded) is None
    with pytest.raises(RunError, match="hidden_cache_dtype is float16, but there is no directory"):
        HiddenCacheOptions(hidden_cache_dtype="float16")
