import hashlib
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import VOCAB_SIZE
from tests.training.corpora import corpus, document
from training.data.dataset import (
    Corpus,
    Span,
    TokenizedConversation,
    build_corpus,
    conversation_documents,
    frequent_tokens,
    split,
)
from training.data.distilled import read_distilled
from training.errors import DataError


def turns(*pairs: tuple[list[int], list[int]]) -> TokenizedConversation:
    return TokenizedConversation("c", "x", pairs, "d.jsonl, line 7")


def test_turns_that_continue_each_other_share_a_document() -> None:
    (found,) = conversation_documents(turns(([1, 2], [3, 4]), ([1, 2, 3, 4, 5], [6])))
    assert found.token_ids_T.tolist() == [1, 2, 3, 4, 5, 6]
    assert found.spans == (Span(2, 4), Span(5, 6))


def test_a_prompt_that_rewrites_the_past_begins_a_new_document() -> None:
    found = conversation_documents(turns(([1, 2], [3, 4]), ([1, 2, 9, 5], [6, 7])))
    assert [doc.token_ids_T.tolist() for doc in found] == [[1, 2, 3, 4], [1, 2, 9, 5, 6, 7]]
    assert [doc.spans for doc in found] == [(Span(2, 4),), (Span(4, 6),)]


def test_roots_are_the_answer_tokens_that_have_one_after_them() -> None:
    found = document(12, (3, 6), (8, 9), (10, 12))
    assert found.roots().tolist() == [3, 4, 10]
    assert found.num_examples == 3


def test_a_file_becomes_documents_with_all_their_answers(distilled_file: Path) -> None:
    found = build_corpus(read_distilled(distilled_file), VOCAB_SIZE)
    conversations = list(read_distilled(distilled_file))
    assert found.num_answer_tokens == sum(c.num_tokens for c in conversations)
    for conversation in conversations:
        documents = [d for d in found.documents if d.conversation_id == conversation.id]
        answers = [
            doc.token_ids_T[span.start : span.end].tolist()
            for doc in documents
            for span in doc.spans
        ]
        assert answers == [answer for _, answer in conversation.turns]


def test_a_token_beyond_the_vocabulary_is_an_error_with_line_and_value() -> None:
    with pytest.raises(DataError, match=f"line 7: conversation 'c' has token id {VOCAB_SIZE}"):
        build_corpus([turns(([1], [VOCAB_SIZE]))], VOCAB_SIZE)


def test_a_split_is_whole_disjoint_and_by_conversation() -> None:
    documents = [document(6, (2, 5), name=f"c{i // 2}", seed=i) for i in range(400)]
    parts = split(Corpus(tuple(documents)), 0.25)
    train = {doc.conversation_id for doc in parts.train.documents}
    held_out = {doc.conversation_id for doc in parts.held_out.documents}
    assert not train & held_out
    assert len(parts.train.documents) + len(parts.held_out.documents) == 400
    assert 0.15 < len(held_out) / 200 < 0.35


def test_a_conversation_stays_on_its_side_when_the_file_grows() -> None:
    small, large = split(corpus(10), 0.5), split(corpus(40), 0.5)
    names = {doc.conversation_id for doc in small.held_out.documents}
    grown = {doc.conversation_id for doc in large.held_out.documents}
    assert names == grown & {f"c{i}" for i in range(10)}


def test_nothing_is_held_out_at_zero() -> None:
    assert split(corpus(20), 0.0).held_out.documents == ()


def test_frequent_tokens_are_those_of_the_answers_alone() -> None:
    documents = corpus(12).documents
    counts: Counter[int] = Counter()
    for doc in documents:
        for span in doc.spans:
            counts.update(doc.token_ids_T[span.start : span.end].tolist())
    by_rank = sorted(range(VOCAB_SIZE), key=lambda token: (-counts[token], token))
    found = frequent_tokens(documents, VOCAB_SIZE, 50)
    assert found.tolist() == by_rank[:50]
    assert found.dtype == torch.int64


def test_a_file_in_the_order_of_its_ids_digests_is_split_evenly() -> None:
    names = sorted(
        (f"c{i}" for i in range(4000)), key=lambda name: hashlib.sha256(name.encode()).digest()
    )
    first = [document(6, (2, 5), name=name) for name in names[:400]]
    held_out = split(Corpus(tuple(first)), 0.1).held_out.documents
    # Binomial with 400 draws of 0.1: outside of these bounds less than once in a million runs.
    assert 10 < len(held_out) < 80
