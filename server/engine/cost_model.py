"""What a step costs, measured on this machine, and the tree size that pays best.

On start the model runs steps of several sizes over scratch blocks. The step seconds between the
measured sizes are interpolated; beyond the largest they grow with the last slope.
"""

import bisect
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

STEP_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)
_NUM_REPEATS = 5


@dataclass(frozen=True, slots=True)
class CostModel:
    """Step seconds by the number of tokens in the step, and the seconds of the draft heads.

    Attributes:
        num_tokens: Measured step sizes, increasing.
        step_s: Median seconds of the forward pass at each size, never falling.
        draft_s: Median seconds of one run of the draft heads at batch 1.
    """

    num_tokens: tuple[int, ...]
    step_s: tuple[float, ...]
    draft_s: float

    def seconds(self, num_tokens: int) -> float:
        """Estimated seconds of a forward pass over `num_tokens` tokens."""
        sizes, step_s = self.num_tokens, self.step_s
        right = min(max(bisect.bisect_left(sizes, num_tokens), 1), len(sizes) - 1)
        left = right - 1
        slope = (step_s[right] - step_s[left]) / (sizes[right] - sizes[left])
        return step_s[left] + slope * (num_tokens - sizes[left])

    def best_num_nodes(self, node_values: Sequence[float], num_sequences: int) -> int:
        """The tree size that makes most tokens per second.

        Args:
            node_values: Probability that each node is accepted, falling; the root has 1.
            num_sequences: Sequences that decode in the step, each with a tree of that size.

        Returns:
            1 (plain decoding, the heads do not run) up to `len(node_values)`.
        """
        best, best_speed = 1, 1.0 / self.seconds(num_sequences)
        expected = 1.0
        for num_nodes, value in enumerate(node_values[1:], start=2):
            expected += value
            step_s = self.seconds(num_sequences * num_nodes) + self.draft_s
            if expected / step_s > best_speed:
                best, best_speed = num_nodes, expected / step_s
        return best


def measure(
    run_step: Callable[[int], object], run_draft: Callable[[], object] | None, max_tokens: int
) -> CostModel:
    """Time steps of growing size.

    Args:
        run_step: Runs a forward pass over the given number of tokens and waits for the device.
        run_draft: Runs the draft heads once; None if there are none.
        max_tokens: Largest size to measure.
    """
    sizes = tuple(size for size in STEP_SIZES if size <= max_tokens)
    run_step(sizes[-1])
    medians: list[float] = []
    for size in sizes:
        step_s = _median_s(functools.partial(run_step, size))
        medians.append(max(step_s, medians[-1] if medians else 0.0))
    if len(sizes) == 1:
        # No room to measure trees, so none may seem cheap.
        sizes, medians = (1, 2), [medians[0], 2 * medians[0]]
    return CostModel(sizes, tuple(medians), _median_s(run_draft) if run_draft else 0.0)


def _median_s(run: Callable[[], object]) -> float:
    run()
    samples = []
    for _ in range(_NUM_REPEATS):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return median(samples)
