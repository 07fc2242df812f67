import pytest
import torch

from heads.medusa import MedusaConfig, MedusaHeads
from server.model.loading import LoadedModel
from tests.training.corpora import corpus
from training.measure.calibration import CalibrationCounter
from training.measure.ranking import UNRANKED, rank_answers
from training.methods.drafts import MedusaDrafts
from training.states.hidden_states import HiddenStateEncoder

K, R = 3, 4


def make_heads(loaded: LoadedModel, draft_vocab_size: int | None) -> MedusaHeads:
    config = MedusaConfig(
        loaded.hidden_size, loaded.vocab_size, num_heads=K, draft_vocab_size=draft_vocab_size
    )
    ids_U = None if draft_vocab_size is None else torch.arange(3, 3 + draft_vocab_size)
    heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding(), ids_U)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return heads.eval()


@pytest.mark.parametrize("draft_vocab_size", [None, 60])
def test_ranks_are_places_among_the_proposed_candidates(
    loaded: LoadedModel, encoder: HiddenStateEncoder, draft_vocab_size: int | None
) -> None:
    heads, documents = make_heads(loaded, draft_vocab_size), corpus(5)
    counter = CalibrationCounter(heads.config.num_heads)
    drafts = MedusaDrafts(encoder, heads)
    answers = iter(rank_answers(documents, drafts, counter, lambda _: None))
    for doc, hidden_ND in zip(
        documents.documents, encoder.encode(documents.documents), strict=True
    ):
        rows = iter(hidden_ND)
        for span in doc.spans:
            answer = next(answers)
            assert answer.num_tokens == span.end - span.start
            tokens = doc.token_ids_T.tolist()
            seen = [heads.seen_rows(tokens[: span.start])]
            assert answer.confidences_NKR is not None
            for root, ranks, confidences_KR in zip(
                range(span.start, span.end - 1), answer.ranks, answer.confidences_NKR, strict=True
            ):
                root_1 = doc.token_ids_T[root : root + 1]
                found = heads.propose(next(rows)[None], root_1, loaded.vocab_size, seen)
                for head, rank in enumerate(ranks):
                    candidates = found.token_ids_BKR[0, head].tolist()
                    at = root + head + 1
                    is_drafted = at < span.end and tokens[at] in candidates
                    confidence_R = confidences_KR[head, : len(candidates)]
                    ours_R = found.log_probs_BKR[0, head, : len(confidence_R)].exp()
                    torch.testing.assert_close(confidence_R[: len(ours_R)], ours_R)
                    assert rank == (candidates.index(tokens[at]) if is_drafted else UNRANKED)


def test_every_document_is_reported(loaded: LoadedModel, encoder: HiddenStateEncoder) -> None:
    counts: list[int] = []
    heads = make_heads(loaded, None)
    counter = CalibrationCounter(heads.config.num_heads)
    rank_answers(corpus(70), MedusaDrafts(encoder, heads), counter, counts.append)
    assert sum(counts) == 70
