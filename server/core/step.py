"""One step as data: what each sequence puts into it, what comes back, and what became of it.

    StepEntry   one sequence's share of a step, made by the scheduler
    Step        all entries, and which drafts follow them; what an executor gets
    Landed      what an executor brings back for one entry
    Outcome     an entry with what was committed of it, made once; commit, learning, drafting and
                outputs all take outcomes

Entries lie in a step one after the other, and so do the nodes of verified ones among the rows of
logits: whatever needs an entry's rows counts them once, in the executor.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from heads.candidates import DraftTokens
from heads.proposals import Proposal
from heads.tree import DraftTree
from server.core.request import FinishReason, TokenLogprob
from server.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepEntry:
    """A sequence's share of a step: committed tokens, then the draft tree's nodes.

    Attributes:
        sequence: Read only here.
        num_committed: Committed tokens computed in this step; the last one is the tree's root if
            `is_verified`.
        drafts: The tree below the root; root only for prompts.
        is_verified: Whether the step reaches the last committed token, so that tokens are drawn.
        is_decoding: Whether this is a verify step rather than the end of a prompt.
    """

    sequence: Sequence
    num_committed: int
    drafts: DraftTokens
    is_verified: bool
    is_decoding: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that the sequence puts into the step."""
        return self.num_committed + self.drafts.tree.num_nodes - 1

    @property
    def root_position(self) -> int:
        """Position of the last committed token of the step, from which the tree grows."""
        return self.sequence.num_computed_tokens + self.num_committed - 1

    def path_tokens(self, node: int) -> list[int]:
        """Draft tokens from below the root down to a node."""
        parents, token_ids = self.drafts.tree.parents, self.drafts.token_ids
        path = []
        while node:
            path.append(token_ids[node])
            node = parents[node]
        return path[::-1]


def root_only(sequence: Sequence) -> DraftTokens:
    """The one-node tree of a sequence: plain decoding."""
    return DraftTokens(DraftTree.root_only(), (sequence.token_ids[-1],))


@dataclass(frozen=True, slots=True)
class DraftAsk:
    """Asks one draft source to draft for the next step, behind this one, on the device.

    Attributes:
        source: Name of the source.
        rooted: Indices of verified entries whose sequences are drafted for if they go on.
        following: Indices of entries in the middle of their prompts, which the source follows.
        min_value: Nodes of a lower path probability need not be drafted.
    """

    source: str
    rooted: tuple[int, ...]
    following: tuple[int, ...]
    min_value: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """What an executor is given.

    Attributes:
        entries: At least one.
        asks: Drafting that follows.
    """

    entries: tuple[StepEntry, ...]
    asks: tuple[DraftAsk, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the base model made of one sequence's drafts.

    Attributes:
        path: Accepted node ids, root first, increasing.
        bonus_token: The target's own token after the last accepted node.
    """

    path: tuple[int, ...]
    bonus_token: int


@dataclass(frozen=True, slots=True)
class Landed:
    """What a step brought for one entry; host values only.

    Attributes:
        verdict: None if the entry was not verified.
        logprobs: One entry for each accepted draft token and the bonus token, if the request asks
            for log-probabilities.
        proposals: What device draft sources say about the next root.
    """

    verdict: Verdict | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    proposals: tuple[Proposal, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an entry.

    Attributes:
        entry: As it was scheduled.
        landed: As the executor brought it.
        token_ids: Tokens that were added to the sequence: accepted draft tokens, then the bonus
            token, up to the end of the text; none if the entry was not verified.
        depths: Their depths in the draft tree; 0 for the bonus token.
        finish_reason: Why the text ends with them, or None; stop strings are looked for later.
    """

    entry: StepEntry
    landed: Landed
    token_ids: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None

    @property
    def path(self) -> tuple[int, ...]:
        """Accepted nodes, root first; none if the entry was not verified."""
        return () if self.landed.verdict is None else self.landed.verdict.path


def verified(outcomes: Seq[Outcome]) -> list[Outcome]:
    """The outcomes of entries that drew tokens."""
    return [outcome for outcome in outcomes if outcome.entry.is_verified]
