import math

import pytest
import torch

from server.model.loading import LoadedModel
from tests.training.corpora import corpus, document
from training.data.dataset import Corpus
from training.errors import DataError
from training.measure.perplexity import comparison, perplexity
from training.states.hidden_states import HiddenStateEncoder


def test_it_is_that_of_the_models_own_logits_over_all_answer_tokens(
    loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    # One answer is longer than what is unembedded at once.
    documents = (*corpus(5).documents, document(400, (20, 390)), document(8, (3, 4)))
    total, num_tokens = 0.0, 0
    for doc in documents:
        with torch.inference_mode():
            logits_TV = loaded.model(input_ids=doc.token_ids_T.unsqueeze(0)).logits[0]
        for span in doc.spans:
            for position in range(span.start, span.end):
                log_probs_V = logits_TV[position - 1].log_softmax(dim=0)
                total -= float(log_probs_V[doc.token_ids_T[position]])
                num_tokens += 1
    found = perplexity(Corpus(documents), encoder, loaded.unembedding())
    assert found == pytest.approx(math.exp(total / num_tokens), rel=1e-4)


def test_no_answers_have_none(loaded: LoadedModel, encoder: HiddenStateEncoder) -> None:
    with pytest.raises(DataError, match="no answers"):
        perplexity(Corpus(()), encoder, loaded.unembedding())


def test_the_ratio_is_that_of_adapted_to_plain() -> None:
    assert comparison(4.0, 4.02) == {"plain": 4.0, "adapted": 4.02, "ratio": 1.005}
