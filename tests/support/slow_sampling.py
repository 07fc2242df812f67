"""Sampling as its documentation has it: one token at a time, in plain Python floats.

The oracle of `server.sampling.logits`, of the acceptance rules on top, and of whole generations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.config import SamplingParams


@dataclass(frozen=True)
class Draw:
    """A drawn token and how far the number lay from the nearest border between two tokens."""

    token_id: int
    margin: float


def adjust_slowly(
    params: SamplingParams,
    logits: Sequence[float],
    prompt: Sequence[int],
    generated: Sequence[int],
) -> list[float]:
    """Penalties and bias by their formulas."""
    adjusted = []
    for token_id, logit in enumerate(logits):
        value = logit
        if token_id in prompt or token_id in generated:
            penalty = params.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        count = list(generated).count(token_id)
        value -= params.frequency_penalty * count
        value -= params.presence_penalty * (count > 0)
        adjusted.append(value + params.logit_bias.get(token_id, 0.0))
    return adjusted


@dataclass(frozen=True)
class Filtered:
    """Probabilities of all tokens, and how far the filters were from keeping other tokens."""

    probabilities: list[float]
    margin: float = 1.0


def filter_slowly(logits: Sequence[float], params: SamplingParams) -> Filtered:
    """Apply temperature, top-k, top-p and min-p; greedy rows are not filtered."""
    if params.is_greedy:
        return Filtered(softmax(logits))
    scaled = [logit / params.temperature for logit in logits]
    falling = sorted(scaled, reverse=True)
    margins = [1.0]
    if 0 < params.top_k < len(falling):
        floor = falling[params.top_k - 1]
        margins.append(floor - falling[params.top_k])
        scaled = [value if value >= floor else -math.inf for value in scaled]
    if params.top_p < 1.0:
        mass, floor = 0.0, -math.inf
        for value, probability in zip(falling, sorted(softmax(scaled), reverse=True), strict=True):
            mass += probability
            margins.append(abs(mass - params.top_p))
            if mass >= params.top_p:
                floor = value
                break
        scaled = [value if value >= floor else -math.inf for value in scaled]
    probabilities = softmax(scaled)
    if params.min_p > 0.0:
        ratios = [value / max(probabilities) for value in probabilities]
        margins += [abs(ratio - params.min_p) for ratio in ratios if ratio < 1.0]
        pairs = zip(probabilities, ratios, strict=True)
        probabilities = [value if ratio >= params.min_p else 0.0 for value, ratio in pairs]
    total = math.fsum(probabilities)
    return Filtered([value / total for value in probabilities], min(margins))


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def draw_slowly(filtered: Filtered, uniform: float) -> Draw:
    """The first token at which the running total passes the number."""
    running, token_id, margin = 0.0, -1, filtered.margin
    possible = [(i, p) for i, p in enumerate(filtered.probabilities) if p > 0.0]
    for candidate, probability in possible:
        running += probability
        if candidate != possible[-1][0]:
            margin = min(margin, abs(running - uniform))
        if token_id < 0 and running > uniform:
            token_id = candidate
    # Rounding may leave the total just below the number.
    return Draw(possible[-1][0] if token_id < 0 else token_id, margin)


def greedy_slowly(logits: Sequence[float]) -> Draw:
    """The most probable token, and by how much its logit leads."""
    first, second = sorted(logits, reverse=True)[:2]
    return Draw(list(logits).index(first), first - second)
