"""The Medusa drafter: what the heads are asked, and the trees that it leaves."""

import pytest
import torch

from heads.candidates import draft_tokens
from heads.medusa import MedusaHeads
from heads.proposals import ROOT_STATE
from heads.tree_search import best_tree
from server.config import SamplingParams
from server.core.sequence import Sequence
from server.speculation.drafter import MedusaDrafter
from tests.support.engine_tools import make_sequence, random_heads, wide_profile

VOCAB = 16
GREEDY = SamplingParams(temperature=0.0)
TREE = best_tree(wide_profile(), 8)


def propose(made: MedusaDrafter) -> Sequence:
    sequence = make_sequence((1, 2), (3,), GREEDY, vocab_size=VOCAB)
    made.propose([sequence], torch.ones(1, 8), [])
    return sequence


def test_fills_its_tree_below_the_last_token() -> None:
    proposal = propose(MedusaDrafter(random_heads(VOCAB), TREE)).head_proposal
    assert proposal is not None
    drafts = proposal.own_tree()
    assert drafts.tree == TREE
    assert drafts.token_ids[0] == 3


def test_asks_the_heads_about_the_last_token_and_the_given_state() -> None:
    heads = random_heads(VOCAB)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    sequences = [make_sequence((1,), (token,), GREEDY, vocab_size=VOCAB) for token in (3, 9)]
    hidden_BD = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    MedusaDrafter(heads, TREE).propose(sequences, hidden_BD, [])
    expected = heads.propose(hidden_BD, torch.tensor([3, 9]), 3, [None, None])
    for sequence, root, ids_KR in zip(
        sequences, (3, 9), expected.token_ids_BKR.tolist(), strict=True
    ):
        assert sequence.head_proposal is not None
        assert sequence.head_proposal.own_tree() == draft_tokens(TREE, root, ids_KR)


def test_sequences_that_prefill_are_left_alone() -> None:
    sequence = make_sequence((1, 2), (), GREEDY, vocab_size=VOCAB)
    MedusaDrafter(random_heads(VOCAB), TREE).propose([], torch.zeros(0, 8), [sequence])
    assert sequence.head_proposal is None


def test_candidates_come_with_the_heads_own_probabilities() -> None:
    heads = random_heads(VOCAB)
    sequence = propose(MedusaDrafter(heads, TREE))
    assert sequence.head_proposal is not None
    expected = heads.propose(torch.ones(1, 8), torch.tensor([3]), 8, [None])
    first = sequence.head_proposal.children(ROOT_STATE)
    assert [child.token_id for child in first] == expected.token_ids_BKR[0, 0].tolist()
    assert [child.probability for child in first] == expected.log_probs_BKR[0, 0].exp().tolist()


def test_imaginary_sequences_can_be_timed() -> None:
    MedusaDrafter(random_heads(VOCAB), TREE).propose_for(1, 4)
    MedusaDrafter(random_heads(VOCAB), best_tree(wide_profile(), 1)).propose_for(3, 4)


@pytest.mark.parametrize("seen", [(1, 2), (1, 9, 14)])
def test_seen_tokens_compete_with_the_draft_vocabulary(seen: tuple[int, ...]) -> None:
    full = random_heads(VOCAB)
    config = type(full.config)(hidden_size=8, vocab_size=VOCAB, num_heads=2, draft_vocab_size=4)
    rows = full.draft_rows_UD
    heads = MedusaHeads(config, rows, rows, torch.tensor([0, 1, 2, 3]))
    made = MedusaDrafter(heads, best_tree(wide_profile(2, 6), 64))
    sequence = make_sequence(seen, (3,), GREEDY, vocab_size=VOCAB)
    sequence.seen_rows = made.seen_rows(seen)
    made.propose([sequence], torch.ones(1, 8), [])
    assert sequence.head_proposal is not None
    assert set(sequence.head_proposal.own_tree().token_ids[1:]) == {0, 1, 2, 3, *seen}
