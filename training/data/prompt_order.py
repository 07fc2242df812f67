"""The order in which prompts are answered, so that no category starves another.

Answers differ in length by category: as many prompts of each would give few tokens of translations
and many of stories. Here the next prompt comes from the category that has the fewest answer tokens
for its weight, so the shares hold wherever the run ends.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from training.data.prompts import Prompts
from training.errors import DataError


class PromptOrder:
    """Hands out prompts; counts the tokens of their answers.

    Args:
        prompts: Prompts that are not yet answered, in file order, which is kept within a category.
        weights: Share of a category's tokens relative to the others; 1 if it is not named, 0
            leaves it out. None keeps the order of the file for all.
        expected_tokens: Guess of a conversation's answer tokens until its category has some.
    """

    def __init__(
        self,
        prompts: Sequence[Prompts],
        weights: Mapping[str, float] | None,
        expected_tokens: int = 128,
    ) -> None:
        self._weights = weights
        self._expected_tokens = expected_tokens
        self._waiting: dict[str, deque[Prompts]] = {}
        for item in prompts:
            self._waiting.setdefault(self._group(item.category), deque()).append(item)
        self._num_tokens = dict.fromkeys(self._waiting, 0)
        self._num_answered = dict.fromkeys(self._waiting, 0)
        self._num_in_flight = dict.fromkeys(self._waiting, 0)

    def __len__(self) -> int:
        """Prompts that are still to be handed out."""
        return sum(map(len, self._waiting.values()))

    def _group(self, category: str) -> str:
        return "" if self._weights is None else category

    def count(self, category: str, num_tokens: int) -> None:
        """Add an answered conversation, of this run or an earlier one."""
        group = self._group(category)
        self._num_tokens[group] = self._num_tokens.get(group, 0) + num_tokens
        self._num_answered[group] = self._num_answered.get(group, 0) + 1

    def finish(self, category: str, num_tokens: int) -> None:
        """Count a conversation that was handed out."""
        self._num_in_flight[self._group(category)] -= 1
        self.count(category, num_tokens)

    def __iter__(self) -> Iterator[Prompts]:
        """Yield each prompt once; what is counted in between decides which comes next."""
        while True:
            open_groups = [g for g, items in self._waiting.items() if items and self._weight(g)]
            if not open_groups:
                return
            group = min(open_groups, key=self._load)
            self._num_in_flight[group] += 1
            yield self._waiting[group].popleft()

    def _weight(self, group: str) -> float:
        return 1.0 if self._weights is None else self._weights.get(group, 1.0)

    def _load(self, group: str) -> float:
        num_answered = self._num_answered[group]
        mean = self._num_tokens[group] / num_answered if num_answered else self._expected_tokens
        num_tokens = self._num_tokens[group] + self._num_in_flight[group] * mean
        return num_tokens / self._weight(group)


def check_weights(weights: Mapping[str, float] | None, prompts: Sequence[Prompts]) -> None:
    """Raise DataError if a weight names a category that no prompt has."""
    known = {item.category for item in prompts}
    unknown = sorted(set(weights or {}) - known)
    if unknown:
        raise DataError(
            f"category {unknown[0]!r} has a weight, but no prompt is of it; the file has "
            f"{', '.join(sorted(known))}"
        )
