"""Finds the positions of a text that repeat an earlier n-gram.

Greedy text of a small model loops, and any drafter predicts a loop well. So the acceptance bench
also reports its figure without the verify steps that only continue a repetition.
"""

from collections.abc import Sequence

NGRAM_LEN = 8


def repeated_positions(token_ids: Sequence[int], ngram_len: int = NGRAM_LEN) -> list[bool]:
    """Mark every position that ends a repeated n-gram.

    Position i is a repeat if the `ngram_len` tokens that end at i, `token_ids[i - n + 1 : i + 1]`,
    also end at some earlier position; the two may overlap. The first n - 1 positions never are.
    """
    seen: set[tuple[int, ...]] = set()
    repeats = [False] * len(token_ids)
    for end in range(ngram_len, len(token_ids) + 1):
        ngram = tuple(token_ids[end - ngram_len : end])
        repeats[end - 1] = ngram in seen
        seen.add(ngram)
    return repeats
