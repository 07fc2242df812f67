"""Finds answers that go in circles, as greedy decoding of a small model often does.

A circle teaches a draft head nothing that its first two rounds did not.
"""

from collections.abc import Sequence

MAX_PERIOD = 24
MIN_REPEATED_TOKENS = 48


def ends_in_circle(token_ids: Sequence[int]) -> bool:
    """Whether the last tokens repeat themselves with a period of at most `MAX_PERIOD`.

    At least `MIN_REPEATED_TOKENS` tokens and four rounds of the period must be equal.
    """
    for period in range(1, MAX_PERIOD + 1):
        length = max(MIN_REPEATED_TOKENS, 4 * period)
        if len(token_ids) < length:
            continue
        tail = token_ids[-length:]
        if tail[period:] == tail[:-period]:
            return True
    return False
