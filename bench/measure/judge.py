"""Compares pairs of outputs that should be equal, and explains where they part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bench.measure.reference import ReferenceModel
from bench.measure.ties import TIE_GAP, first_difference, greedy_gap, sampled_gap
from bench.workload.dialogues import Turn
from server.config import SamplingParams
from server.sampling.uniform import uniform

CheckName = Literal["greedy_vs_transformers", "greedy_on_vs_off", "sampled_on_vs_off"]
Output = Sequence[int]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two outputs of one turn that a check wants equal.

    Attributes:
        outputs: Ours, and what it should equal.
        params: How both were drawn; with a seed if they were sampled.
    """

    check: CheckName
    turn: Turn
    outputs: tuple[Output, Output]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Two outputs that differ, and what their first difference depends on.

    Attributes:
        line: Line of the conversation in the data file.
        turn: Number of the turn in the conversation, from 1.
        position: Index of the first different token in the output.
        tokens: The two tokens there; None where an output had ended.
        gap: Logit gap that decides between the two tokens; None if an output had ended.
        margin: For samples, the distance of the drawn number from the farther token's interval.
        is_tie: Whether the gap proves a floating-point tie.
    """

    check: CheckName
    line: int
    turn: int
    category: str
    position: int
    tokens: tuple[int | None, int | None]
    gap: float | None
    margin: float | None
    is_tie: bool


class Judge:
    """Compares pairs of outputs and explains their differences with the plain model."""

    def __init__(self, reference: ReferenceModel) -> None:
        self._reference = reference

    def compare(self, pair: Pair) -> Mismatch | None:
        """The first difference of two outputs, or None if they are equal."""
        turn, outputs, params = pair.turn, pair.outputs, pair.params
        position = first_difference(*outputs)
        if position is None:
            return None
        left, right = (output[position] if position < len(output) else None for output in outputs)
        gap = margin = None
        if left is not None and right is not None:
            prefix = (*turn.prompt_token_ids, *outputs[0][:position])
            logits_V = self._reference.next_logits(prefix)
            if params.seed is None:
                gap = greedy_gap(logits_V, (left, right))
            else:
                drawn = uniform(params.seed, len(prefix))
                sampled = sampled_gap(logits_V, params, drawn, (left, right))
                gap, margin = sampled.gap, sampled.margin
        return Mismatch(
            check=pair.check,
            line=turn.conversation.line,
            turn=turn.index + 1,
            category=turn.conversation.category,
            position=position,
            tokens=(left, right),
            gap=gap,
            margin=margin,
            is_tie=gap is not None and gap < TIE_GAP,
        )
