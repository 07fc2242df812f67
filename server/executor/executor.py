"""The seam to the device: the engine plans on the host, an executor computes.

    launch(step) -> Flight      packs the step and sends it off
    Flight.land() -> Landing    waits for it: host values only

`server.executor.host` is the member there is; one of CUDA graphs or a tensor-parallel one would be
another. Between launch and landing the engine finishes the step before: text, stop strings and
outputs. A flight may be dropped without landing where nobody is left who waits for it; what it
writes lies in slots that nobody has computed yet.

A step refers to its sequences, whose logit processors and draft sources keep tensors of their own;
an executor in another process must have them there.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from heads.proposals import Proposal
from server.core.sequence import Sequence
from server.core.step import Landed, Step


@dataclass(frozen=True, slots=True)
class DraftRun:
    """One run of a device draft source at the end of a step.

    Attributes:
        source: Name of the source.
        num_rooted: Sequences that it drafted for.
        num_following: Sequences whose prompts it followed.
        seconds: How long it took.
    """

    source: str
    num_rooted: int
    num_following: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Landing:
    """What a step brought back.

    Attributes:
        entries: For each entry of the step what it brought, in order.
        step_s: Seconds of the step itself: packing, forward pass, verification and compaction.
        draft_runs: The drafting that followed.
        stage_s: All seconds by stage: `pack`, `forward`, `verify`, `compact` and `draft`.
    """

    entries: tuple[Landed, ...]
    step_s: float
    draft_runs: tuple[DraftRun, ...] = ()
    stage_s: dict[str, float] = field(default_factory=dict)


class Flight(Protocol):
    """A step that is under way."""

    def land(self) -> Landing:
        """Wait for the step; called once at most."""


class Executor(Protocol):
    """Runs steps on a device."""

    def launch(self, step: Step) -> Flight:
        """Send a step off; the blocks of its entries are reserved."""

    def hidden_states(self, block_table: Seq[int], count: int) -> Tensor:
        """Copy the base model's hidden states of a sequence's first tokens, `[count, D]`.

        Only where hidden states are kept, and these tokens are computed.
        """

    def time_step(self, num_tokens: int, num_sequences: int, context_len: int) -> float:
        """Seconds of a forward pass over imaginary sequences, each with so many new tokens.

        They read and write blocks from the first one on, which must be unused.
        """

    def time_drafts(self, num_sequences: int, context_len: int) -> float:
        """Seconds of one run of all device draft sources for imaginary sequences."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """A sequence that a device draft source drafts for, or follows, after a step.

    Attributes:
        sequence: As it was before the step; read only but for the source's own state.
        new_ids: Tokens that the step adds, the next step's root last; none for a prompt that goes
            on.
        num_computed_tokens: Tokens whose KV is computed after the step.
    """

    sequence: Sequence
    new_ids: tuple[int, ...]
    num_computed_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence after the step."""
        return len(self.sequence.token_ids) + len(self.new_ids)

    def tokens(self, first: int, end: int) -> list[int]:
        """The sequence's tokens after the step from one position to before another."""
        known = self.sequence.token_ids
        start, stop = (max(0, place - len(known)) for place in (first, end))
        return [*known[first:end], *self.new_ids[start:stop]]


class Drafter(Protocol):
    """The part of a draft source that runs on the device, at the end of a step."""

    def draft(
        self,
        rooted: Seq[Drafting],
        hidden_BD: Tensor,
        following: Seq[Drafting],
        min_value: float,
    ) -> list[Proposal | None]:
        """Draft for the next step.

        Args:
            rooted: Sequences that go on; their last new tokens are the next step's roots.
            hidden_BD: The base model's hidden state from which each of these roots was drawn.
            following: Sequences in the middle of their prompts. They are not drafted for, but a
                drafter with a KV cache of its own follows them.
            min_value: Nodes of a lower path probability need not be drafted.

        Returns:
            One proposal for each rooted sequence; None where there is none.
        """

    def draft_for(self, num_sequences: int, context_len: int) -> None:
        """Draft for imaginary sequences of that length, to time it; blocks must be unused."""
