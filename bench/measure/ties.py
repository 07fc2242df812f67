"""Decides whether two outputs part at a floating-point tie, from the model's own logits.

Two correct programs may differ in the last bits of a logit. Where that decides a token, the
outputs part, and all later text follows from it; so only the first difference is judged. A
difference is a proven tie if moving every logit by at most half the reported *gap*, up or down,
suffices to produce either token.

Shapes: V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from server.config import SamplingParams
from server.sampling.logits import filter_logits

TIE_GAP = 1e-3


@dataclass(frozen=True, slots=True)
class SampledGap:
    """How close a drawn number lies to giving both of two tokens.

    Attributes:
        gap: Twice the largest change of a logit that is needed; infinite if none suffices.
        margin: Distance, in probability, of the drawn number from the farther one of the two
            tokens' intervals of the cumulative distribution.
    """

    gap: float
    margin: float


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Index of the first token in which two outputs differ, one ending included; None if equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def greedy_gap(logits_V: Tensor, tokens: tuple[int, int]) -> float:
    """How far the less likely of two tokens lies below the largest logit.

    Raising that token's logit and lowering all others by half the gap makes it the argmax.
    """
    worst = min(float(logits_V[token]) for token in tokens)
    return float(logits_V.max()) - worst


def sampled_gap(
    logits_V: Tensor, params: SamplingParams, uniform: float, tokens: tuple[int, int]
) -> SampledGap:
    """How far the target distribution is from giving either token for one drawn number.

    A token is drawn if the number u lies in its interval [F(t - 1), F(t)) of the cumulative
    distribution F over token ids. Raising the logits up to t by e and lowering the others by e
    takes logit(F(t)) to logit(F(t)) + 2e / temperature, and no change of at most e takes it
    further. So reaching u needs 2e = temperature * |logit(u) - logit(F(t))|, which is the gap.

    Args:
        logits_V: Float32 logits of the base model, unprocessed.
        params: Temperature, top-k, top-p and min-p of the request; no penalties.
        uniform: The number in [0, 1) that drew the token.
        tokens: The two tokens that were drawn.
    """
    probs_V = filter_logits(logits_V[None], [params])[0].double().softmax(-1)
    below_V = probs_V.cumsum(0)
    above_V = probs_V.flip(0).cumsum(0).flip(0)
    gaps, margins = [0.0], [0.0]
    for token in tokens:
        # Mass below and above each end of the interval, both summed without cancellation.
        end_mass = float(below_V[token]), float(above_V[token]) - float(probs_V[token])
        start_mass = end_mass[0] - float(probs_V[token]), float(above_V[token])
        if float(probs_V[token]) == 0.0:
            gaps.append(math.inf)
            margins.append(1.0)
        elif uniform >= end_mass[0]:
            gaps.append(params.temperature * _log_odds_distance(uniform, end_mass))
            margins.append(uniform - end_mass[0])
        elif uniform < start_mass[0]:
            gaps.append(params.temperature * _log_odds_distance(uniform, start_mass))
            margins.append(start_mass[0] - uniform)
    return SampledGap(max(gaps), max(margins))


def _log_odds_distance(uniform: float, mass: tuple[float, float]) -> float:
    below, above = mass
    if not 0.0 < uniform < 1.0 or below <= 0.0 or above <= 0.0:
        return math.inf
    odds = math.log(uniform) - math.log1p(-uniform)
    return abs(odds - (math.log(below) - math.log(above)))
