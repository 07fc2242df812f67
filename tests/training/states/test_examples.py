import pytest
import torch

from tests.training.corpora import corpus, document
from training.data.batches import BatchPlan
from training.data.dataset import NO_LABEL, Corpus, Document
from training.states.examples import Examples, ExampleSource, document_examples
from training.states.hidden_states import HiddenStateEncoder

K = 3


def rows(examples: Examples) -> list[tuple[object, ...]]:
    """Each example as a value that can be compared and sorted."""
    return [
        (tuple(hidden_D), root, tuple(labels_K))
        for hidden_D, root, labels_K in zip(
            # Batches of other sizes may round differently.
            examples.hidden_ND.round(decimals=3).tolist(),
            examples.roots_N.tolist(),
            examples.labels_NK.tolist(),
            strict=True,
        )
    ]


def source(
    encoder: HiddenStateEncoder, plan: BatchPlan, documents: Corpus | None = None
) -> ExampleSource:
    return ExampleSource(documents or corpus(9), encoder, K, plan)


def test_labels_are_the_tokens_after_the_root_and_end_with_the_answer(
    encoder: HiddenStateEncoder,
) -> None:
    doc = document(20, (3, 5), (8, 13))
    tokens = doc.token_ids_T.tolist()
    found = document_examples(doc, encoder.encode_answers([doc])[0], K)
    ends = {3: 5, 8: 13, 9: 13, 10: 13, 11: 13}
    assert found.roots_N.tolist() == [tokens[root] for root in ends]
    expected = [
        [tokens[root + k + 1] if root + k + 1 < end else NO_LABEL for k in range(K)]
        for root, end in ends.items()
    ]
    assert found.labels_NK.tolist() == expected


def test_no_user_token_is_ever_a_root_or_a_label(encoder: HiddenStateEncoder) -> None:
    doc = document(30, (4, 9), (15, 22), (25, 30))
    answers = {t for span in doc.spans for t in doc.token_ids_T[span.start : span.end].tolist()}
    found = document_examples(doc, encoder.encode_answers([doc])[0], K)
    used = set(found.roots_N.tolist()) | set(found.labels_NK.flatten().tolist())
    assert used <= answers | {NO_LABEL}


@pytest.mark.parametrize("is_cached", [True, False])
def test_an_epoch_has_every_example_once(encoder: HiddenStateEncoder, is_cached: bool) -> None:
    plan = BatchPlan(7, 0, is_cached, group_size=4)
    ours = source(encoder, plan)
    batches = list(ours.batches(epoch=0))
    documents = corpus(9).documents
    everything = Examples.join(
        [
            document_examples(doc, states_MD, K)
            for doc, states_MD in zip(documents, encoder.encode_answers(documents), strict=True)
        ]
    )
    assert sorted(rows(Examples.join(batches))) == sorted(rows(everything))
    assert len(batches) == ours.num_batches(0)
    assert all(len(batch) <= 7 for batch in batches)


@pytest.mark.parametrize("is_cached", [True, False])
def test_the_order_is_that_of_seed_and_epoch(encoder: HiddenStateEncoder, is_cached: bool) -> None:
    def order(seed: int, epoch: int) -> list[tuple[object, ...]]:
        plan = BatchPlan(7, seed, is_cached, group_size=4)
        return rows(Examples.join(list(source(encoder, plan).batches(epoch))))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


@pytest.mark.parametrize("is_cached", [True, False])
def test_an_epoch_can_be_resumed_at_any_batch(encoder: HiddenStateEncoder, is_cached: bool) -> None:
    ours = source(encoder, BatchPlan(7, 0, is_cached, group_size=3))
    whole = [rows(batch) for batch in ours.batches(2)]
    for first in range(len(whole) + 1):
        assert [rows(batch) for batch in ours.batches(2, first)] == whole[first:]


def test_filling_the_cache_reports_every_document_once(encoder: HiddenStateEncoder) -> None:
    counts: list[int] = []
    ours = source(encoder, BatchPlan(2048, 0, group_size=4))
    ours.fill_cache(counts.append)
    ours.fill_cache(counts.append)
    assert counts == [4, 4, 1]


def test_documents_without_examples_are_left_out(encoder: HiddenStateEncoder) -> None:
    only = Corpus((document(8, (5, 6)), document(9, (5, 8))))
    ours = source(encoder, BatchPlan(2048, 0, is_cached=False, group_size=1), only)
    assert [len(batch) for batch in ours.batches(0)] == [2]


def states_slowly(
    encoder: HiddenStateEncoder, doc: Document
) -> tuple[list[torch.Tensor], dict[tuple[int, int], torch.Tensor]]:
    """For each root, and each root's every label, the state that its token was drawn from."""
    (hidden_XD,) = encoder.encode_all([doc])
    roots: list[torch.Tensor] = []
    labels: dict[tuple[int, int], torch.Tensor] = {}
    for span in doc.spans:
        for root in range(span.start, span.end - 1):
            for head in range(K):
                if root + head + 1 < span.end:
                    labels[len(roots), head] = hidden_XD[root + head]
            roots.append(hidden_XD[root - 1])
    return roots, labels


def check_states(examples: Examples, documents: Corpus, encoder: HiddenStateEncoder) -> None:
    first = 0
    for doc in documents.documents:
        roots, labels = states_slowly(encoder, doc)
        for index, hidden_D in enumerate(roots):
            torch.testing.assert_close(examples.hidden_ND[first + index], hidden_D)
        for (index, head), hidden_D in labels.items():
            torch.testing.assert_close(examples.label_states(head)[first + index], hidden_D)
        is_labelled = examples.labels_NK[first : first + len(roots)] != NO_LABEL
        assert [tuple(at) for at in is_labelled.nonzero().tolist()] == sorted(labels)
        first += len(roots)
    assert first == len(examples)


def test_states_are_those_that_roots_and_labels_were_drawn_from(
    encoder: HiddenStateEncoder,
) -> None:
    doc = document(30, (4, 9), (15, 16), (18, 22), (25, 30))
    found = document_examples(doc, encoder.encode_answers([doc])[0], K)
    check_states(found, Corpus((doc,)), encoder)


def test_states_stay_with_their_examples_when_these_are_joined_taken_and_divided(
    encoder: HiddenStateEncoder,
) -> None:
    documents = corpus(5)
    encoded = encoder.encode_answers(documents.documents)
    pairs = zip(documents.documents, encoded, strict=True)
    whole = Examples.join([document_examples(doc, states_MD, K) for doc, states_MD in pairs])
    check_states(whole, documents, encoder)
    order_N = torch.randperm(len(whole))
    back = whole.take(order_N).take(order_N.argsort())
    check_states(back, documents, encoder)
    check_states(Examples.join(whole.divide(4)), documents, encoder)


def test_taken_examples_point_into_the_same_states() -> None:
    rows_N, labels_NK = torch.tensor([0, 1, 3]), torch.zeros(3, K, dtype=torch.int64)
    examples = Examples(torch.arange(8.0).view(4, 2), rows_N, torch.arange(3), labels_NK)
    taken = examples.take(torch.tensor([2, 0]))
    assert taken.roots_N.tolist() == [2, 0]
    assert len(taken) == 2
    assert taken.states_MD is examples.states_MD
    assert taken.hidden_ND.tolist() == [[6.0, 7.0], [0.0, 1.0]]
    assert taken.label_states(1).tolist() == [[6.0, 7.0], [4.0, 5.0]]
