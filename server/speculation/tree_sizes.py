"""How large the trees of a step are: fixed, or planned by what steps cost here and now."""

from collections.abc import Sequence as Seq
from collections.abc import Set as AbstractSet
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
    """How well steps were predicted, in all.

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


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What became of a step, as far as its costs go.

    Attributes:
        num_tokens: Tokens that were computed.
        load: Decoding sequences, and the computed tokens of all sequences.
        num_emitted: Tokens that its verify steps emitted.
        step_s: Seconds without drafting.
        drafts: For each run of device draft sources that only drafted: number of sequences, and
            seconds.
    """

    num_tokens: int
    load: StepLoad
    num_emitted: int
    step_s: float
    drafts: tuple[tuple[int, float], ...] = ()


class TreeSizes(Protocol):
    """Chooses the sizes of the trees that were drafted."""

    def choose(self, decoding: Seq[Sequence], request: StepRequest) -> list[int]:
        """Nodes of each sequence's tree, root included."""

    def wants_heads(self, num_decoding: int) -> bool:
        """Whether the heads should run before a step of so many decoding sequences."""

    def least_value(self) -> float:
        """Nodes that are worth less will hardly be verified, so need not be drafted."""

    def learn(self, record: StepRecord) -> None:
        """Take note of a step."""

    def stats(self) -> "SizeStats":
        """What is believed, and how well it held."""


@dataclass(frozen=True, slots=True)
class SizeStats:
    """What sizes are chosen by.

    Attributes:
        costs: What steps are believed to cost; None if sizes do not depend on it.
        foresight: How well steps were predicted; None if they are not.
    """

    costs: StepCosts | None = None
    foresight: Foresight | None = None


class FixedSizes(TreeSizes):
    """The same size for all, whatever it costs."""

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    def choose(self, decoding: Seq[Sequence], request: StepRequest) -> list[int]:
        """The fixed size; all shrink alike where there is no room."""
        room = 1 + request.max_draft_tokens // max(1, len(decoding))
        return [min(self._num_nodes, room, sequence.drafts_allowed) for sequence in decoding]

    def wants_heads(self, num_decoding: int) -> bool:
        """Always, unless trees have no room for drafts."""
        return self._num_nodes > 1

    def least_value(self) -> float:
        """No node is worth too little."""
        return 0.0

    def learn(self, record: StepRecord) -> None:
        """Nothing depends on what steps cost."""

    def stats(self) -> SizeStats:
        """Nothing is believed."""
        return SizeStats()


@dataclass(slots=True)
class _Load:
    """What was learned at one number of decoding sequences."""

    gate: HeadGate = field(default_factory=HeadGate)
    pace: Pace = field(default_factory=Pace)
    prompt_share: float = 0.0


class PlannedSizes(TreeSizes):
    """One budget for all sequences, by what steps cost here and now.

    Args:
        costs: Learns from every step.
        device_sources: Names of the draft sources whose runs cost time.
    """

    def __init__(self, costs: StepCosts, device_sources: AbstractSet[str]) -> None:
        self._costs = costs
        self._device_sources = device_sources
        self._foresight = Foresight()
        self._loads: dict[int, _Load] = {}
        self._node_price = 0.0

    def choose(self, decoding: Seq[Sequence], request: StepRequest) -> list[int]:
        """The sizes that `plan_trees` finds best."""
        num_roots = len(decoding)
        values = [_values(sequence) for sequence in decoding]
        num_headed = sum(sequence.has_device_drafts for sequence in decoding)
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
        if any(sequence.sources for sequence in decoding):
            learned.pace.note(plan)
            has_prompts = request.num_prompt_tokens > 0
            learned.prompt_share += _SHARE_FADING * (has_prompts - learned.prompt_share)
        if any(not self._device_sources.isdisjoint(one.sources) for one in decoding):
            learned.gate.note(num_headed > 0, plan.gain)
        self._node_price += _PRICE_FADING * (plan.node_price - self._node_price)
        self._predict(values, plan)
        return list(plan.sizes)

    def wants_heads(self, num_decoding: int) -> bool:
        """What the gate of such a load says."""
        return self._load(num_decoding).gate.is_open()

    def least_value(self) -> float:
        """Half of the present price, since loads change."""
        return min(_MAX_LEAST_VALUE, 0.5 * self._node_price)

    def learn(self, record: StepRecord) -> None:
        """Correct the costs, and compare with what was predicted."""
        self._foresight.seconds += self._costs.seconds(record.num_tokens, record.load)
        self._foresight.measured_tokens += record.num_emitted
        self._foresight.measured_seconds += record.step_s
        self._costs.learn(record.num_tokens, record.load, record.step_s)
        for num_sequences, draft_s in record.drafts:
            self._foresight.seconds += self._costs.draft_seconds(num_sequences)
            self._foresight.measured_seconds += draft_s
            self._costs.learn_draft(num_sequences, draft_s)

    def stats(self) -> SizeStats:
        """The costs as they are now, and all predictions so far."""
        return SizeStats(self._costs, self._foresight)

    def _load(self, num_decoding: int) -> _Load:
        # Numbers that are alike go together, so that each learns from many steps.
        rounded = num_decoding if num_decoding <= 8 else -(-num_decoding // 8) * 8
        return self._loads.setdefault(rounded, _Load())

    def _predict(self, values: Seq[Seq[float]], plan: Plan) -> None:
        chosen = zip(values, plan.sizes, strict=True)
        self._foresight.num_tokens += sum(1.0 + sum(own[: size - 1]) for own, size in chosen)


def _values(sequence: Sequence) -> list[float]:
    """Values of the nodes that were drafted for a sequence, falling."""
    proposal = sequence.proposal
    return [] if proposal is None else [estimate.value for estimate in proposal.estimates]
