from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.attention.hook import AttentionContext
from server.model.loading import LoadedModel
from tests.training.corpora import corpus, document
from tests.training.mtp_modules import make_module
from training.data.dataset import Corpus
from training.measure.calibration import CalibrationCounter
from training.measure.ranking import UNRANKED, rank_answers
from training.methods.drafts import MTPDrafts
from training.methods.unrolled_attention import Unroll, UnrolledAttention
from training.states.hidden_states import HiddenStateEncoder

K = 3


@pytest.mark.parametrize("num_drafted", [20, 320])
def test_ranks_of_a_module_are_places_among_what_it_would_draft_token_by_token(
    loaded: LoadedModel, encoder: HiddenStateEncoder, num_drafted: int
) -> None:
    module, layer = make_module(loaded, torch.arange(num_drafted))
    # Of few tokens, so that some of a prompt's are drawn again.
    documents = [
        replace(doc, token_ids_T=doc.token_ids_T % 40)
        for doc in (*corpus(3).documents, document(20, (6, 13), (15, 20), seed=9))
    ]

    def decoded(tokens: Tensor, hidden_XD: Tensor, root: int, depth: int) -> Tensor:
        states = torch.cat((torch.zeros_like(hidden_XD[:1]), hidden_XD[:root]))
        for _ in range(depth):
            positions = torch.arange(len(states))
            memory = Unroll()
            memory.begin_depth([positions])
            runner = layer.runner(positions, AttentionContext(UnrolledAttention(), memory))
            output: Tensor = module(states, tokens[positions], runner)
            states = torch.cat((states, output[-1:]))
        return output[-1]

    drafts = MTPDrafts(encoder, module, layer, K)
    with torch.no_grad():
        answers = iter(
            rank_answers(Corpus(tuple(documents)), drafts, CalibrationCounter(K), lambda _: None)
        )
        num_checked = num_seen = 0
        for doc in documents:
            (hidden_XD,) = encoder.encode_all([doc])
            tokens = doc.token_ids_T
            for span in doc.spans:
                answer = next(answers)
                seen = module.seen_rows(tokens[: span.start].tolist())
                ids = list(range(num_drafted)) + ([] if seen is None else seen.token_ids_E.tolist())
                for root, ranks_K in zip(
                    range(span.start, span.end - 1), answer.ranks, strict=True
                ):
                    for depth, rank in enumerate(ranks_K, start=1):
                        label = int(tokens[root + depth]) if root + depth < span.end else -1
                        if label not in ids:
                            assert rank == UNRANKED
                            continue
                        logits_V = loaded.unembedding()[ids] @ decoded(
                            tokens, hidden_XD, root, depth
                        )
                        # Ties aside, up to rounding between two orders of summation.
                        drawn = logits_V[ids.index(label)]
                        low = int((logits_V > drawn + 1e-2).sum())
                        assert low <= rank <= int((logits_V > drawn - 1e-2).sum())
                        num_checked += 1
                        num_seen += label >= num_drafted
    assert num_checked > 20
    assert (num_seen > 0) == (num_drafted < 320)


def test_a_document_without_roots_has_no_states(
    loaded: LoadedModel, encoder: HiddenStateEncoder
) -> None:
    module, layer = make_module(loaded, torch.arange(60))
    drafts = MTPDrafts(encoder, module, layer, K)
    first, second = drafts.states([document(8, (5, 6)), document(8, (5, 7))])
    assert first.shape == (K, 0, loaded.hidden_size)
    assert second.shape == (K, 1, loaded.hidden_size)
