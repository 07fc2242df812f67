"""How large the trees of a step are: fixed, or planned by what steps cost here and now."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from server.core.sequence import Sequence
from server.speculation.cost_model import StepCosts, StepLoad
from server.speculation.planner import HeadGate, Pace, Plan, StepRequest, Worth, plan_trees

_PRICE_FADING = 0.1
_SHARE_FADING = 0.02
_MAX_LEAST_VALUE = 0.1


@dataclass(slots=True)
class Foresight:
    """How well steps were foretold, in all.

    Attributes:
        num_tokens: Tokens that verify steps were expected to emit.
        seconds: That steps and drafting were expected to take.
        measured_tokens: Tokens that these verify steps emitted.
        measured_seconds: That these steps and drafting took.
    """

    num_tokens: float = 0.0
    seconds: float = 0.0
    measured_tokens: int = 0
    measured_seconds: float = 0.0


class TreeSizes(Protocol):
    """Chooses the sizes of the trees that were drafted."""

    @property
    def costs(self) -> StepCosts | None:
        """Of steps, if sizes hang on them."""

    @property
    def foresight(self) -> Foresight | None:
        """How well steps were foretold, if they are."""

    def choose(self, decoding: Seq[Sequence], request: StepRequest) -> list[int]:
        """Nodes of each sequence's tree, root included."""

    def wants_heads(self, num_decoding: int) -> bool:
        """Whether the heads should run before a step of so many decoding sequences."""

    def least_value(self) -> float:
        """Nodes that are worth less will hardly be verified, so need not be drafted."""

    def learn_step(self, num_tokens: int, load: StepLoad, num_emitted: int, step_s: float) -> None:
        """Take note of a step's seconds, and of the tokens that its verify steps emitted."""

    def learn_draft(self, num_sequences: int, draft_s: float) -> None:
        """Take note of the seconds that the heads took."""


class FixedSizes:
    """The same size for all, whatever it costs."""

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def costs(self) -> StepCosts | None:
        """See `TreeSizes.costs`."""
        return None

    @property
    def foresight(self) -> Foresight | None:
        """See `TreeSizes.foresight`."""
        return None

    def choose(self, decoding: Seq[Sequence], request: StepRequest) -> list[int]:
        """See `TreeSizes.choose`; all shrink alike where there is no room."""
        room = 1 + request.max_draft_tokens // max(1, len(decoding))
        return [min(self._num_nodes, room, sequence.drafts_allowed) for sequence in decoding]

    def wants_heads(self, num_decoding: int) -> bool:
        """See `TreeSizes.wants_heads`."""
        return self._num_nodes > 1

    def least_value(self) -> float:
        """See `TreeSizes.least_value`."""
        return 0.0

    def learn_step(self, num_tokens: int, load: StepLoad, num_emitted: int, step_s: float) -> None:
        """See `TreeSizes.learn_step`; nothing hangs on it."""

    def learn_draft(self, num_sequences: int, draft_s: float) -> None:
        """See `TreeSizes.learn_draft`; nothing hangs on it."""


@dataclass(slots=True)
class _Load:
    """What was learned at one number of decoding sequences."""

    gate: HeadGate = field(default_factory=HeadGate)
    pace: Pace = field(default_factory=Pace)
    prompt_share: float = 0.0


class PlannedSizes:
    """One budget for all sequences, by what steps cost here and now.

    Args:
        costs: Learns from every step.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._foresight = Foresight()
        self._loads: dict[int, _Load] = {}
        self._node_price = 0.0

    @property
    def costs(self) -> StepCosts | None:
        """See `TreeSizes.costs`."""
        return self._costs

    @property
    def foresight(self) -> Foresight:
        """See `TreeSizes.foresight`."""
        return self._foresight

    def choose(self, decoding: Seq[Sequence], request: StepRequest) -> list[int]:
        """See `TreeSizes.choose`."""
        num_roots = len(decoding)
        values = [_values(sequence) for sequence in decoding]
        num_headed = sum(sequence.head_proposal is not None for sequence in decoding)
        learned = self._load(num_roots)
        plan = plan_trees(
            values,
            self._costs,
            StepLoad(num_roots, sum(sequence.num_computed_tokens for sequence in decoding)),
            request,
            self._costs.draft_seconds(num_headed) if num_headed else 0.0,
            Worth(learned.pace.speed, learned.prompt_share),
        )
        # Requests that want no drafts would make time look cheap to the next one that does.
        if any(sequence.sources.any for sequence in decoding):
            learned.pace.note(plan)
            has_prompts = request.num_prompt_tokens > 0
            learned.prompt_share += _SHARE_FADING * (has_prompts - learned.prompt_share)
        if any(sequence.sources.heads is not None for sequence in decoding):
            learned.gate.note(num_headed > 0, plan.gain)
        self._node_price += _PRICE_FADING * (plan.node_price - self._node_price)
        self._foretell(values, plan)
        return list(plan.sizes)

    def wants_heads(self, num_decoding: int) -> bool:
        """See `TreeSizes.wants_heads`."""
        return self._load(num_decoding).gate.is_open()

    def least_value(self) -> float:
        """See `TreeSizes.least_value`; loads change, so half of the present price."""
        return min(_MAX_LEAST_VALUE, 0.5 * self._node_price)

    def learn_step(self, num_tokens: int, load: StepLoad, num_emitted: int, step_s: float) -> None:
        """See `TreeSizes.learn_step`."""
        self._foresight.seconds += self._costs.seconds(num_tokens, load)
        self._foresight.measured_tokens += num_emitted
        self._foresight.measured_seconds += step_s
        self._costs.learn(num_tokens, load, step_s)

    def learn_draft(self, num_sequences: int, draft_s: float) -> None:
        """See `TreeSizes.learn_draft`."""
        self._foresight.seconds += self._costs.draft_seconds(num_sequences)
        self._foresight.measured_seconds += draft_s
        self._costs.learn_draft(num_sequences, draft_s)

    def _load(self, num_decoding: int) -> _Load:
        # Numbers that are alike go together, so that each learns from many steps.
        rounded = num_decoding if num_decoding <= 8 else -(-num_decoding // 8) * 8
        return self._loads.setdefault(rounded, _Load())

    def _foretell(self, values: Seq[Seq[float]], plan: Plan) -> None:
        chosen = zip(values, plan.sizes, strict=True)
        self._foresight.num_tokens += sum(1.0 + sum(own[: size - 1]) for own, size in chosen)


def _values(sequence: Sequence) -> list[float]:
    """Values of the nodes that were drafted for a sequence, falling."""
    proposal = sequence.proposal
    return [] if proposal is None else [estimate.value for estimate in proposal.estimates]
