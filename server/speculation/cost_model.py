"""What a step costs: measured when the server starts, refined by every step that it takes.

On start the model runs steps of several sizes over scratch blocks. Seconds between the measured
sizes are interpolated; beyond the largest they grow with the last slope. Each further sequence and
each further token of KV adds to that.

Shape suffixes: N step sizes.
"""

import bisect
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

STEP_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)
_NUM_REPEATS = 5
# How far one step moves what is believed of steps of its size.
_LEARNING_RATE = 0.05
# How much of that goes to the size where a step had several sequences.
_SIZE_SHARE = 0.2
# A step that took this many times what was foretold was disturbed by something else.
_OUTLIER = 3.0
_MIN_RATIO, _MAX_RATIO = 0.2, 5.0
_log = logging.getLogger("euryale.speculation")


@dataclass(frozen=True, slots=True)
class CostModel:
    """Measured seconds.

    Attributes:
        num_tokens: Measured step sizes, increasing.
        step_s: Median seconds of a step of each size, never falling, of one sequence.
        draft_s: Median seconds of one run of the draft heads for one sequence.
        context_len: KV tokens of the measured sequence.
        sequence_s: What each further sequence adds to a step.
        draft_sequence_s: What each further sequence adds to a run of the draft heads.
        kv_token_s: What each KV token beyond `context_len` adds to a step.
    """

    num_tokens: tuple[int, ...]
    step_s: tuple[float, ...]
    draft_s: float
    context_len: int = 0
    sequence_s: float = 0.0
    draft_sequence_s: float = 0.0
    kv_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step's cost hangs on, besides its draft tokens.

    Attributes:
        num_sequences: That take part.
        num_kv_tokens: Computed tokens of all of them.
    """

    num_sequences: int
    num_kv_tokens: int = 0


class StepCosts:
    """A cost model that learns from the steps that are taken.

    There is a correction for each measured size and, beyond one sequence, one for each power of two
    of sequences. Without the latter, what many sequences cost would be taken for the cost of their
    tokens, and mislead a single sequence later.

    Attributes:
        measured: What was measured before the first one.
    """

    def __init__(self, measured: CostModel) -> None:
        self.measured = measured
        self._sizes = np.array(measured.num_tokens, dtype=np.float64)
        self._ratios = [1.0] * len(measured.num_tokens)
        self._load_ratios: dict[int, float] = {}
        self._draft_ratio = 1.0
        self._steps_s = self._corrected()

    def seconds(self, num_tokens: int, load: StepLoad) -> float:
        """Expected seconds of a step of that many tokens."""
        return float(self.all_seconds(num_tokens, num_tokens, load)[0])

    def all_seconds(self, first: int, last: int, load: StepLoad) -> NDArray[np.float64]:
        """Expected seconds of steps of `first` to `last` tokens, both included."""
        sizes_N = np.arange(first, last + 1, dtype=np.float64)
        seconds_N = np.interp(sizes_N, self._sizes, self._steps_s)
        slope = (self._steps_s[-1] - self._steps_s[-2]) / (self._sizes[-1] - self._sizes[-2])
        seconds_N += slope * np.maximum(0.0, sizes_N - self._sizes[-1])
        return (seconds_N + self._further_s(load)) * self._load_ratio(load)

    def draft_seconds(self, num_sequences: int) -> float:
        """Expected seconds of one run of the draft heads."""
        measured = self.measured
        further = measured.draft_sequence_s * (num_sequences - 1)
        return (measured.draft_s + further) * self._draft_ratio

    def learn(self, num_tokens: int, load: StepLoad, step_s: float) -> None:
        """Take note of a step's seconds."""
        expected = self.seconds(num_tokens, load)
        if not 0.0 < step_s < _OUTLIER * expected:
            return
        error = step_s / expected - 1.0
        if load.num_sequences > 1:
            self._load_ratios[_load_class(load)] = _moved(self._load_ratio(load), error)
            error *= _SIZE_SHARE
        right = min(max(bisect.bisect_left(self.measured.num_tokens, num_tokens), 1), self._last)
        span = self._sizes[right] - self._sizes[right - 1]
        share = min(1.0, max(0.0, float((num_tokens - self._sizes[right - 1]) / span)))
        for index, weight in ((right - 1, 1.0 - share), (right, share)):
            self._ratios[index] = _moved(self._ratios[index], weight * error)
        self._steps_s = self._corrected()

    def learn_draft(self, num_sequences: int, draft_s: float) -> None:
        """Take note of the seconds of a run of the draft heads."""
        expected = self.draft_seconds(num_sequences)
        if 0.0 < draft_s < _OUTLIER * expected:
            self._draft_ratio *= 1.0 + _LEARNING_RATE * (draft_s / expected - 1.0)

    @property
    def _last(self) -> int:
        return len(self.measured.num_tokens) - 1

    def _corrected(self) -> NDArray[np.float64]:
        steps_N = np.array(self.measured.step_s) * np.array(self._ratios)
        return np.maximum.accumulate(steps_N)

    def _load_ratio(self, load: StepLoad) -> float:
        return self._load_ratios.get(_load_class(load), 1.0)

    def _further_s(self, load: StepLoad) -> float:
        measured = self.measured
        further_tokens = max(0, load.num_kv_tokens - measured.context_len * load.num_sequences)
        further_sequences = max(0, load.num_sequences - 1)
        return measured.sequence_s * further_sequences + measured.kv_token_s * further_tokens


def _moved(ratio: float, error: float) -> float:
    return min(_MAX_RATIO, max(_MIN_RATIO, ratio * (1.0 + _LEARNING_RATE * error)))


def _load_class(load: StepLoad) -> int:
    """Loads that are corrected alike: 1 sequence, 2, 3 to 4, 5 to 8 and so on."""
    return (max(1, load.num_sequences) - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Probes:
    """What a measurement runs; each call waits for the device.

    Attributes:
        step: A forward pass over so many tokens of one sequence.
        long_step: A step of one token over a context that is longer by `num_further_tokens`.
        many_step: A step of `num_sequences` sequences with one token each.
        draft: The draft heads for so many sequences; None if there are none.
        max_tokens: Of a `step`.
    """

    step: Callable[[int], object]
    long_step: Callable[[], object]
    many_step: Callable[[], object]
    draft: Callable[[int], object] | None
    context_len: int
    num_further_tokens: int
    num_sequences: int
    max_tokens: int


def root_step_s(probes: Probes) -> float:
    """Median seconds of a step of one token."""
    return _median_s(functools.partial(probes.step, 1))


def measure(probes: Probes) -> CostModel:
    """Time steps of growing size, with more KV and with more sequences."""
    sizes = tuple(size for size in STEP_SIZES if size <= probes.max_tokens)
    _log.info("measuring the step cost: steps of 1 to %d tokens", sizes[-1])
    probes.step(sizes[-1])
    medians: list[float] = []
    for size in sizes:
        step_s = _median_s(functools.partial(probes.step, size))
        medians.append(max(step_s, medians[-1] if medians else 0.0))
    if len(sizes) == 1:
        # No room to measure trees, so none may seem cheap.
        sizes, medians = (1, 2), [medians[0], 2 * medians[0]]
    kv_token_s = sequence_s = draft_s = draft_sequence_s = 0.0
    _log.info("measuring the step cost: a longer context and more sequences")
    if probes.num_further_tokens:
        further_s = _median_s(probes.long_step) - medians[0]
        kv_token_s = max(0.0, further_s / probes.num_further_tokens)
    num_further = probes.num_sequences - 1
    if num_further:
        same_tokens_s = _interpolated(sizes, medians, probes.num_sequences)
        sequence_s = max(0.0, (_median_s(probes.many_step) - same_tokens_s) / num_further)
    if probes.draft is not None:
        _log.info("measuring the step cost: the draft heads")
        draft_s = _median_s(functools.partial(probes.draft, 1))
    if probes.draft is not None and num_further:
        many_s = _median_s(functools.partial(probes.draft, probes.num_sequences))
        draft_sequence_s = max(0.0, (many_s - draft_s) / num_further)
    return CostModel(
        sizes,
        tuple(medians),
        draft_s,
        probes.context_len,
        sequence_s,
        draft_sequence_s,
        kv_token_s,
    )


def _interpolated(sizes: Sequence[int], seconds: Sequence[float], size: int) -> float:
    return float(np.interp(size, sizes, seconds))


def _median_s(run: Callable[[], object]) -> float:
    run()
    samples = []
    for _ in range(_NUM_REPEATS):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return median(samples)
