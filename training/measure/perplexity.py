"""How well a base model predicts the answers, whether an adapter is merged into it or not.

Shape suffixes: N tokens, D model width, V vocabulary.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from server.cli.console import progress_bar
from training.data.dataset import Corpus
from training.errors import DataError
from training.states.hidden_states import HiddenStateEncoder

_DOCUMENTS_AT_ONCE = 64
# Logits of so many tokens are in memory together.
_ROWS = 256


@torch.no_grad()
def perplexity(corpus: Corpus, encoder: HiddenStateEncoder, unembedding_VD: Tensor) -> float:
    """Return the perplexity of all answer tokens, each given what is before it.

    Args:
        corpus: Answers.
        encoder: Runs the base model, as it is to be measured.
        unembedding_VD: That model's unembedding.

    Raises:
        DataError: If there are no answers.
    """
    total, num_tokens = 0.0, 0
    with progress_bar("perplexity", len(corpus.documents)) as bar:
        for first in range(0, len(corpus.documents), _DOCUMENTS_AT_ONCE):
            documents = corpus.documents[first : first + _DOCUMENTS_AT_ONCE]
            encoded = encoder.encode_answers(documents)
            for document, hidden_ND in zip(documents, encoded, strict=True):
                drawn_N = document.token_ids_T[document.answers()].to(hidden_ND.device)
                for start in range(0, len(drawn_N), _ROWS):
                    rows = slice(start, start + _ROWS)
                    logits_NV = F.linear(hidden_ND[rows], unembedding_VD)
                    total += negative_log_likelihood(logits_NV, drawn_N[rows])
                num_tokens += len(drawn_N)
            bar.advance(len(documents))
    if num_tokens == 0:
        raise DataError("there are no answers to measure the perplexity of; give more data")
    return math.exp(total / num_tokens)


def negative_log_likelihood(logits_NV: Tensor, token_ids_N: Tensor) -> float:
    """Sum the negative log-probs that logits give to tokens, in nats; computed in float32."""
    return float(F.cross_entropy(logits_NV.float(), token_ids_N, reduction="sum"))


def comparison(plain: float, adapted: float) -> dict[str, float]:
    """Return what is printed of a base model's perplexity without and with an adapter."""
    return {
        "plain": round(plain, 4),
        "adapted": round(adapted, 4),
        "ratio": round(adapted / plain, 5),
    }
