"""Medusa heads as a draft source: what the heads are asked, and what they propose."""

from collections.abc import Sequence as Seq

import pytest
import torch
from torch import Tensor

from heads.medusa import MedusaHeads
from heads.proposals import ROOT_STATE, Proposal
from server.config import SamplingParams
from server.core.sequence import Sequence
from server.executor.executor import Drafting
from server.speculation.sources.medusa import MedusaSource
from tests.support.engine_tools import make_sequence, random_heads, wide_profile

VOCAB = 16
GREEDY = SamplingParams(temperature=0.0)


def source(heads: MedusaHeads | None = None, max_nodes: int = 8) -> MedusaSource:
    return MedusaSource(heads or random_heads(VOCAB), wide_profile(), max_nodes)


def rooted(made: MedusaSource, *tokens: int, prompt: tuple[int, ...] = (1, 2)) -> list[Drafting]:
    """Sequences whose step brought one token each."""
    found = []
    for token in tokens:
        sequence = make_sequence(prompt, (), GREEDY, vocab_size=VOCAB)
        made.prepare(sequence)
        found.append(Drafting(sequence, (token,), len(prompt)))
    return found


def draft(made: MedusaSource, drafting: Seq[Drafting], hidden_BD: Tensor) -> list[Proposal]:
    assert made.drafter is not None
    proposals = made.drafter.draft(drafting, hidden_BD, [], min_value=0.0)
    assert None not in proposals
    return [proposal for proposal in proposals if proposal is not None]


def first_tokens(proposal: Proposal) -> list[int]:
    return [child.token_id for child in proposal.children(ROOT_STATE)]


def test_asks_the_heads_about_the_new_root_and_the_given_state() -> None:
    heads = random_heads(VOCAB)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    made = source(heads)
    hidden_BD = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    proposals = draft(made, rooted(made, 3, 9), hidden_BD)
    expected = heads.propose(hidden_BD, torch.tensor([3, 9]), 8, [None, None])
    for proposal, ids_KR in zip(proposals, expected.token_ids_BKR.tolist(), strict=True):
        for state, ids_R in enumerate(ids_KR):
            assert [child.token_id for child in proposal.children(state)] == ids_R


def test_candidates_come_with_the_heads_own_probabilities() -> None:
    heads = random_heads(VOCAB)
    made = source(heads)
    (proposal,) = draft(made, rooted(made, 3), torch.ones(1, 8))
    expected = heads.propose(torch.ones(1, 8), torch.tensor([3]), 8, [None])
    first = proposal.children(ROOT_STATE)
    assert [child.token_id for child in first] == expected.token_ids_BKR[0, 0].tolist()
    assert [child.probability for child in first] == expected.log_probs_BKR[0, 0].exp().tolist()


def test_prompts_in_progress_are_left_alone() -> None:
    made = source()
    sequence: Sequence = make_sequence((1, 2), (), GREEDY, vocab_size=VOCAB)
    assert made.drafter is not None
    following = [Drafting(sequence, (), 1)]
    assert made.drafter.draft([], torch.zeros(0, 8), following, min_value=0.0) == []


def test_imaginary_sequences_can_be_timed() -> None:
    for max_nodes, num_sequences in ((8, 1), (1, 3)):
        drafter = source(max_nodes=max_nodes).drafter
        assert drafter is not None
        drafter.draft_for(num_sequences, 4)


@pytest.mark.parametrize("seen", [(1, 2), (1, 9, 14)])
def test_seen_tokens_compete_with_the_draft_vocabulary(seen: tuple[int, ...]) -> None:
    full = random_heads(VOCAB)
    config = type(full.config)(hidden_size=8, vocab_size=VOCAB, num_heads=2, draft_vocab_size=4)
    rows = full.draft_rows_UD
    made = source(MedusaHeads(config, rows, rows, torch.tensor([0, 1, 2, 3])))
    (proposal,) = draft(made, rooted(made, 3, prompt=seen), torch.ones(1, 8))
    assert set(first_tokens(proposal)) == {0, 1, 2, 3, *seen}
