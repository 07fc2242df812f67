"""What heads are worth while they are trained: mean acceptance length on a few held-out answers."""

import hashlib

from heads.tree_search import best_tree
from training.data.dataset import Corpus, Document
from training.measure.acceptance import NUM_RANKS
from training.measure.calibration import CalibrationCounter
from training.measure.drafts import Drafts
from training.measure.evaluate import measure_profile, walk
from training.measure.ranking import rank_answers

TREE_SIZE = 16
# Prompts included; so many are measured in seconds.
MAX_TOKENS = 16_384


def sample(held_out: Corpus, max_tokens: int = MAX_TOKENS) -> Corpus:
    """Take some documents with examples, at most so many tokens but at least one document.

    Their ids alone decide which ones, so that a file sorted by category gives some of each.
    """
    documents: list[Document] = []
    num_tokens = 0
    for document in sorted(held_out.documents, key=_digest):
        num_tokens += len(document.token_ids_T) if document.num_examples else 0
        if documents and num_tokens > max_tokens:
            break
        if document.num_examples:
            documents.append(document)
    return Corpus(tuple(documents))


def _digest(document: Document) -> bytes:
    return hashlib.sha256(f"validation {document.conversation_id}".encode()).digest()


def acceptance_length(corpus: Corpus, drafts: Drafts) -> float:
    """Return the tokens per verify step with the best static tree of `TREE_SIZE` nodes.

    Raises:
        DataError: If no answer has two tokens.
    """
    counter = CalibrationCounter(drafts.num_depths)
    answers = rank_answers(corpus, drafts, counter, lambda _: None)
    profile = measure_profile(answers, NUM_RANKS, TREE_SIZE)
    return walk(answers, best_tree(profile, TREE_SIZE)).mean_acceptance_length
