"""How many nodes each sequence's tree gets: one budget for all, spent where it brings most.

Every node has a value, the probability that it is accepted, and nodes of all sequences compete: the
n most valuable ones are taken. A second of a step is worth what the server makes in it on average,
its *pace* in tokens per second, so n is the one of the highest

    sequences + values of the n best nodes - pace * step seconds(n)

Many tokens in little time are what is wanted over all steps, not in each of them: a step whose
drafts are poor must not cost more than they bring elsewhere, and one whose drafts are good may take
longer. Where nodes are chosen so and the pace is what came of it, no other choice makes more tokens
per second over all steps (W. Dinkelbach, On Nonlinear Fractional Programming, 1967). While the pace
is unknown, the n of the highest tokens per second of this step is taken.

A prompt pays for the step that it shares, so what decodes there costs no more than it adds. While
there are always prompts, nothing else is ever saved: a draft that is accepted saves a root of a
later step, which adds as much as two nodes do, so a node must be worth half a token. Where only
some steps carry prompts, what a token saves is the mean of both.

Shape suffixes: N numbers of draft tokens, from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.speculation.cost_model import StepCosts, StepLoad

# What a root adds to a step with prompts, in further nodes: besides its token, attention to a
# context of its own, logits and the handling of a sequence. Measured: 2.5 ms against 0.9 to 1.4 ms
# of a node (8 sequences behind 300 tokens and a chunk of 64, float32, two cores).
_ROOT_NODES = 2.0


@dataclass(frozen=True, slots=True)
class StepRequest:
    """What a step has room for.

    Attributes:
        num_prompt_tokens: Prompt tokens that will share it, roughly.
        max_draft_tokens: Draft tokens of all trees together.
    """

    num_prompt_tokens: int
    max_draft_tokens: int


@dataclass(frozen=True, slots=True)
class Worth:
    """What time is worth.

    Attributes:
        pace: Tokens per second that steps of this load make on average; None if it is unknown.
        prompt_share: Of the recent steps of this load, those that carried prompts.
    """

    pace: float | None = None
    prompt_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Trees of a step.

    Attributes:
        sizes: Nodes of each sequence's tree, root included.
        num_tokens: Expected tokens of such a step without prompts.
        seconds: That this step and its drafting would take.
        node_price: Tokens that the next node's seconds would bring; nodes worth less do not pay.
        gain: Expected tokens of all drafts beyond what their seconds would bring.
    """

    sizes: tuple[int, ...]
    num_tokens: float
    seconds: float
    node_price: float
    gain: float


def plan_trees(
    values: Sequence[Sequence[float]],
    costs: StepCosts,
    load: StepLoad,
    request: StepRequest,
    draft_s: float,
    worth: Worth,
) -> Plan:
    """Choose the trees of decoding sequences.

    Args:
        values: For each sequence the values of its nodes below the root, falling.
        costs: Of steps.
        load: Of the decoding sequences.
        request: Room for prompts and drafts.
        draft_s: What drafting cost.
        worth: Of a second.
    """
    num_roots = len(values)
    # Sorting is stable: equal values stay in the order of their trees, so sizes are prefixes.
    ranked = sorted(
        ((value, owner) for owner, own in enumerate(values) for value in own),
        key=lambda item: -item[0],
    )[: max(0, request.max_draft_tokens)]
    gains_N = np.zeros(len(ranked) + 1)
    np.cumsum([value for value, _ in ranked], out=gains_N[1:])
    # One more than can be drafted, for the price of the next node.
    seconds_N = costs.all_seconds(num_roots, num_roots + len(ranked) + 1, load)
    whole_N = seconds_N[:-1] + draft_s
    pace = worth.pace
    if pace is None:
        best = int(((num_roots + gains_N) / whole_N).argmax())
        pace = float((num_roots + gains_N[best]) / whole_N[best])
    best = int((gains_N - pace * whole_N).argmax())
    num_tokens, seconds = num_roots + float(gains_N[best]), float(whole_N[best])
    if request.num_prompt_tokens:
        num_others = num_roots + request.num_prompt_tokens
        seconds_N = costs.all_seconds(num_others, num_others + len(ranked) + 1, load)
        pace = _pace_beside_prompts(pace, seconds_N, worth.prompt_share)
        best = int((gains_N - pace * seconds_N[:-1]).argmax())
    added_s = float(seconds_N[best] - seconds_N[0]) + draft_s
    sizes = [1] * num_roots
    for _, owner in ranked[:best]:
        sizes[owner] += 1
    return Plan(
        sizes=tuple(sizes),
        num_tokens=num_tokens,
        seconds=seconds,
        node_price=pace * float(seconds_N[best + 1] - seconds_N[best]),
        gain=float(gains_N[best]) - pace * added_s,
    )


def _pace_beside_prompts(pace: float, seconds_N: NDArray[np.float64], prompt_share: float) -> float:
    """What a second is worth in a step with prompts, by what it is worth without."""
    node_s = float(seconds_N[-1] - seconds_N[0]) / (len(seconds_N) - 1)
    saved_s = prompt_share * _ROOT_NODES * node_s + (1.0 - prompt_share) / pace
    # Where nodes are free, time is worth what it is worth elsewhere.
    return max(pace, 1.0 / saved_s) if saved_s > 0.0 else pace


@dataclass(slots=True)
class Pace:
    """Tokens per second that the recent steps of one load were planned to make."""

    _num_tokens: float = 0.0
    _seconds: float = 0.0

    @property
    def speed(self) -> float | None:
        """Tokens per second; None before the first step."""
        return self._num_tokens / self._seconds if self._seconds else None

    def note(self, plan: Plan) -> None:
        """Take note of a step."""
        self._num_tokens += plan.num_tokens - _PACE_FADING * self._num_tokens
        self._seconds += plan.seconds - _PACE_FADING * self._seconds


# Steps without the heads (or with them, while they do not pay) after which the other way is tried.
_FIRST_PROBE, _LAST_PROBE = 16, 256
_FADING = 0.2
# The share of what a pace knows that each step takes the place of.
_PACE_FADING = 0.02


@dataclass(slots=True)
class _Way:
    """Drafting with the heads, or without: what drafts were planned to gain, lately."""

    gain: float = 0.0
    is_known: bool = False

    def note(self, gain: float) -> None:
        self.gain += (_FADING if self.is_known else 1.0) * (gain - self.gain)
        self.is_known = True


class HeadGate:
    """Decides for one load whether the draft heads run before the next step.

    The way that is planned to gain more is taken; the other is tried now and then, the more
    rarely the longer it loses.
    """

    def __init__(self) -> None:
        self._with = _Way()
        self._without = _Way()
        self._probe_interval = _FIRST_PROBE
        self._num_steps = 0

    def is_open(self) -> bool:
        """Whether to run the heads now."""
        if not self._with.is_known:
            return True
        pays = self._pays()
        self._num_steps += 1
        if self._num_steps < self._probe_interval:
            return pays
        self._num_steps = 0
        self._probe_interval = min(_LAST_PROBE, 2 * self._probe_interval)
        return not pays

    def note(self, has_heads: bool, gain: float) -> None:
        """Take note of a plan's gain."""
        paid = self._pays()
        (self._with if has_heads else self._without).note(gain)
        if self._pays() != paid:
            self._probe_interval = _FIRST_PROBE

    def _pays(self) -> bool:
        return not self._without.is_known or self._with.gain >= self._without.gain
