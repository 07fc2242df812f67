"""What draft sources say about a sequence, as trees are built from it."""

from heads.calibration import head_cell
from heads.candidates import DraftTokens
from heads.lookup import LookupProposal, Match, lookup_cell, lookup_prior
from heads.proposals import ROOT_STATE, Child, GrownProposal, MedusaProposal
from heads.tree import DraftTree

TREE = DraftTree((-1, 0, 0, 1), (-1, 0, 1, 0))


def head_child(token_id: int, probability: float, depth: int, state: int) -> Child:
    return Child(token_id, probability, state, head_cell(depth, probability))


def copied_child(
    token_id: int, length: int, is_longest: bool, state: int, place: int = -1
) -> Child:
    prior = lookup_prior(length, is_longest)
    return Child(token_id, prior, state, lookup_cell(length, is_longest), place)


def test_medusa_candidates_depend_on_the_depth() -> None:
    proposal = MedusaProposal([[3, 4], [5, -1]], [[0.6, 0.2], [0.7, 0.0]])
    assert proposal.children(ROOT_STATE) == [head_child(3, 0.6, 1, 1), head_child(4, 0.2, 1, 1)]
    assert proposal.children(1) == [head_child(5, 0.7, 2, 2)], "padding is no candidate"
    assert not proposal.children(2)
    assert proposal.state_after_other(1) == 2


def test_a_grown_tree_s_candidates_depend_on_the_node() -> None:
    proposal = GrownProposal(DraftTokens(TREE, (9, 3, 4, 5)), (0.6, 0.2, 0.7))
    assert proposal.children(ROOT_STATE) == [head_child(3, 0.6, 1, 1), head_child(4, 0.2, 1, 2)]
    assert proposal.children(1) == [head_child(5, 0.7, 2, 3)]
    assert not proposal.children(3)
    assert proposal.state_after_other(0) is None


def test_copied_candidates_depend_on_the_place_in_the_text() -> None:
    proposal = LookupProposal([Match(5, (4, 6)), Match(2, (4, 7), 30)])
    (first,) = proposal.children(ROOT_STATE)
    assert first == copied_child(4, 5, True, 1, place=30)
    assert proposal.children(1) == [
        copied_child(6, 6, True, 2),
        copied_child(7, 3, False, 3, place=31),
    ]
    assert not proposal.children(2)
    assert proposal.state_after_other(0) is None


def test_each_names_its_source() -> None:
    drafts = DraftTokens(DraftTree.root_only(), (9,))
    made = MedusaProposal([], []), GrownProposal(drafts, ()), LookupProposal([])
    assert [proposal.source for proposal in made] == ["medusa", "mtp", "lookup"]
