from dataclasses import replace

import pytest
import torch

from tests.training.corpora import corpus, document
from training.data.batches import BatchPlan
from training.data.dataset import Corpus
from training.states.encoded import EncodedBatch, EncodedSource
from training.states.hidden_states import HiddenStateEncoder

PLAN = BatchPlan(50, 5, group_size=3)


def names(batches: list[EncodedBatch]) -> list[list[str]]:
    return [[item.document.conversation_id for item in batch.documents] for batch in batches]


def made(encoder: HiddenStateEncoder, is_cached: bool, documents: Corpus) -> EncodedSource:
    return EncodedSource(documents, encoder, replace(PLAN, is_cached=is_cached))


@pytest.mark.parametrize("is_cached", [True, False])
def test_an_epoch_has_every_document_once_in_batches_of_so_many_tokens(
    encoder: HiddenStateEncoder, is_cached: bool
) -> None:
    source = made(encoder, is_cached, corpus(12))
    batches = list(source.batches(0))
    assert len(batches) == source.num_batches(0)
    found = [name for batch in names(batches) for name in batch]
    assert sorted(found) == sorted(doc.conversation_id for doc in corpus(12).documents)
    for batch in batches:
        assert sum(len(item.document.token_ids_T) for item in batch.documents) <= 50
        assert len(batch) == sum(item.document.num_examples for item in batch.documents)


def test_a_document_longer_than_a_batch_is_alone(encoder: HiddenStateEncoder) -> None:
    lengths = (60, 8, 70, 9)
    documents = [document(n, (3, n), seed=n, name=str(n)) for n in lengths]
    batches = names(list(made(encoder, True, Corpus(tuple(documents))).batches(0)))
    assert ["60"] in batches
    assert ["70"] in batches


@pytest.mark.parametrize("is_cached", [True, False])
def test_states_are_those_of_the_documents(encoder: HiddenStateEncoder, is_cached: bool) -> None:
    for batch in made(encoder, is_cached, corpus(9)).batches(1):
        for item in batch.documents:
            (expected_XD,) = encoder.encode_all([item.document])
            found_XD = item.hidden_XD.float()
            # The cache has eight bits.
            tolerance = 2.0**-8 if is_cached else 1e-4
            torch.testing.assert_close(found_XD, expected_XD, rtol=tolerance, atol=1e-3)


def test_a_cache_changes_no_batch_and_epochs_differ(encoder: HiddenStateEncoder) -> None:
    cached, streamed = (made(encoder, is_cached, corpus(12)) for is_cached in (True, False))
    assert names(list(cached.batches(2))) == names(list(streamed.batches(2)))
    assert names(list(cached.batches(2))) != names(list(cached.batches(3)))


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("first", [1, 3, 5])
def test_an_epoch_resumed_in_its_middle_goes_on_with_the_very_same_numbers(
    encoder: HiddenStateEncoder, is_cached: bool, first: int
) -> None:
    whole = list(made(encoder, is_cached, corpus(12)).batches(1))
    rest = list(made(encoder, is_cached, corpus(12)).batches(1, first))
    assert names(rest) == names(whole)[first:]
    for ours, expected in zip(rest, whole[first:], strict=True):
        for a, b in zip(ours.documents, expected.documents, strict=True):
            assert torch.equal(a.hidden_XD, b.hidden_XD)


def test_documents_without_an_example_are_left_out(encoder: HiddenStateEncoder) -> None:
    documents = Corpus((document(8, (5, 6), name="none"), document(9, (5, 8), name="some")))
    assert names(list(made(encoder, True, documents).batches(0))) == [["some"]]


def test_filling_the_cache_reports_every_document_once(encoder: HiddenStateEncoder) -> None:
    counts: list[int] = []
    source = made(encoder, True, corpus(8))
    source.fill_cache(counts.append)
    source.fill_cache(counts.append)
    assert counts == [3, 3, 2]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 9])
def test_a_batch_falls_into_parts_of_about_as_many_tokens_in_order(
    encoder: HiddenStateEncoder, num_parts: int
) -> None:
    (whole,) = EncodedSource(corpus(6), encoder, BatchPlan(1000, 0)).batches(0)
    parts = whole.divide(num_parts)
    assert len(parts) == num_parts
    assert [item for part in parts for item in part.documents] == list(whole.documents)
    assert sum(map(len, parts)) == len(whole)
    lengths = [len(item.document.token_ids_T) for item in whole.documents]
    for part in parts:
        num_tokens = sum(len(item.document.token_ids_T) for item in part.documents)
        assert abs(num_tokens - sum(lengths) / num_parts) <= max(lengths)
