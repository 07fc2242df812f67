"""How many nodes each sequence's tree gets: one budget for all, spent where it brings most.

Every node has a value, the probability that it is accepted, and nodes of all sequences compete. In
a step without prompts the n most valuable nodes are taken, for the n that makes most tokens per
second of the whole server, the drafting counted:

    speed(n) = (sequences + values of the n best nodes) / (step seconds(n) + draft seconds)

Larger steps make more tokens a second but come less often. A latency weight w takes the n of the
highest speed(n) / (step seconds(n) + draft seconds) ** w instead.

Prompt tokens in the step are work of another kind, so there the n best nodes are taken for the n
that brings most over what the same seconds, weighted alike, would bring at that speed.

Shape suffixes: N numbers of draft tokens, from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.engine.cost_model import StepCosts, StepLoad


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
class Plan:
    """Trees of a step.

    Attributes:
        sizes: Nodes of each sequence's tree, root included.
        speed: Tokens per second that such steps make without prompts.
        node_price: Tokens that the next node's seconds would bring; nodes worth less do not pay.
    """

    sizes: tuple[int, ...]
    speed: float
    node_price: float


def plan_trees(
    values: Sequence[Sequence[float]],
    costs: StepCosts,
    load: StepLoad,
    request: StepRequest,
    draft_s: float,
    latency_weight: float,
) -> Plan:
    """Choose the trees of decoding sequences.

    Args:
        values: For each sequence the values of its nodes below the root, falling.
        costs: Of steps.
        load: Of the decoding sequences.
        request: Room for prompts and drafts.
        draft_s: What drafting cost.
        latency_weight: 0 for most tokens per second; larger for shorter steps.
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
    speeds_N = (num_roots + gains_N) / whole_N
    best = int((speeds_N / whole_N**latency_weight).argmax())
    speed = float(speeds_N[best])
    # At the best n, what a second more costs in tokens.
    second_price = speed * (1.0 + latency_weight)
    node_price = second_price * float(seconds_N[best + 1] - seconds_N[best])
    if request.num_prompt_tokens:
        num_tokens = num_roots + request.num_prompt_tokens
        seconds_N = costs.all_seconds(num_tokens, num_tokens + len(ranked), load)
        best = int((gains_N - second_price * seconds_N).argmax())
    sizes = [1] * num_roots
    for _, owner in ranked[:best]:
        sizes[owner] += 1
    return Plan(tuple(sizes), speed, node_price)


# Steps without the heads (or with them, while they do not pay) after which the other way is tried.
_FIRST_PROBE, _LAST_PROBE = 16, 256
_FADING = 0.2


@dataclass(slots=True)
class _Way:
    """Drafting with the heads, or without: how fast it was planned to be, lately."""

    speed: float = 0.0
    is_known: bool = False

    def note(self, speed: float) -> None:
        self.speed += (_FADING if self.is_known else 1.0) * (speed - self.speed)
        self.is_known = True


class HeadGate:
    """Decides for one load whether the draft heads run before the next step.

    The way that is planned to be faster is taken; the other is tried now and then, the more
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

    def note(self, has_heads: bool, speed: float) -> None:
        """Take note of a plan's tokens per second."""
        paid = self._pays()
        (self._with if has_heads else self._without).note(speed)
        if self._pays() != paid:
            self._probe_interval = _FIRST_PROBE

    def _pays(self) -> bool:
        return not self._without.is_known or self._with.speed >= self._without.speed
