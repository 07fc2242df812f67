"""What heads say about a sequence, as trees are built from it."""

from heads.candidates import DraftTokens, draft_tokens
from heads.proposals import ROOT_STATE, Child, GrownProposal, MedusaProposal
from heads.tree import DraftTree

TREE = DraftTree((-1, 0, 0, 1), (-1, 0, 1, 0))


def test_medusa_candidates_hang_on_the_depth() -> None:
    proposal = MedusaProposal(TREE, 9, [[3, 4], [5, -1]], [[0.6, 0.2], [0.7, 0.0]])
    assert proposal.children(ROOT_STATE) == [Child(3, 0.6, 1), Child(4, 0.2, 1)]
    assert proposal.children(1) == [Child(5, 0.7, 2)], "padding is no candidate"
    assert not proposal.children(2)
    assert proposal.state_beside(1) == 2
    assert proposal.own_tree() == draft_tokens(TREE, 9, [[3, 4], [5, -1]])


def test_a_grown_tree_s_candidates_hang_on_the_node() -> None:
    drafts = DraftTokens(TREE, (9, 3, 4, 5))
    proposal = GrownProposal(drafts, (0.6, 0.2, 0.7))
    assert proposal.children(ROOT_STATE) == [Child(3, 0.6, 1), Child(4, 0.2, 2)]
    assert proposal.children(1) == [Child(5, 0.7, 3)]
    assert not proposal.children(3)
    assert proposal.state_beside(0) is None
    assert proposal.own_tree() is drafts
