"""Prompt lookup: drafts copied from where the sequence's last tokens stood before.

A model that summarises, edits or answers from a passage repeats it, and repeats itself. Wherever
the newest tokens occurred earlier, what followed them there is a draft of what follows now; the
longer the match, the surer. Source: prompt lookup decoding (A. Saxena, 2023); REST,
arXiv:2311.08252, for merging several continuations into a trie.

Plain Python over token ids; knows no model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heads.proposals import Child

# Never a token id, so that no match reaches from the prediction into the sequence.
_BOUNDARY = -1
# Earlier occurrences that are looked at, newest first.
_MAX_OCCURRENCES = 32
# Longer matches share a cell of the calibration.
MAX_MATCH = 16
# Probability that the token after a match of 1, 2, ... tokens comes again, before any traffic: what
# 75,000 places in the built-in model's answers to prompts of many kinds gave, a little lower.
_LONGEST_PRIORS = (0.2, 0.5, 0.6, 0.68, 0.72, 0.76, 0.79, 0.81, 0.83, 0.84, 0.85, 0.86, 0.87, 0.88)
_LAST_PRIOR = 0.95
# Where a further match goes on differently; there the length hardly matters.
_FURTHER_PRIOR = 0.12


def lookup_cell(length: int, is_longest: bool) -> int:
    """Cell of the token after a match of `length` tokens, from 1."""
    return 2 * (min(length, MAX_MATCH) - 1) + is_longest


def lookup_prior(length: int, is_longest: bool) -> float:
    """Raw probability of the token after a match."""
    if not is_longest:
        return _FURTHER_PRIOR
    return _LONGEST_PRIORS[length - 1] if length <= len(_LONGEST_PRIORS) else _LAST_PRIOR


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier occurrence of a sequence's newest tokens.

    Attributes:
        length: Tokens that agree, the newest included; at least 1.
        continuation: What followed there.
        prediction_place: Index in the prediction at which the continuation begins; -1 if it is not
            copied from there.
    """

    length: int
    continuation: tuple[int, ...]
    prediction_place: int = -1


class LookupIndex:
    """Finds earlier occurrences of a growing sequence's newest tokens.

    Adding a token and finding matches take constant time.

    Args:
        token_ids: The sequence so far.
        prediction: Text that the sequence may go on with although it is no part of it. What comes
            next is looked for at its beginning, and later wherever the newest tokens stand in it.
        max_length: Longest match that is told from shorter ones.
    """

    def __init__(
        self, token_ids: Sequence[int], prediction: Sequence[int] = (), max_length: int = 16
    ) -> None:
        self._max_length = max_length
        self._tokens: list[int] = []
        # For every place the one before it that has the same token, or the same two; -1 for none.
        self._before_1: list[int] = []
        self._before_2: list[int] = []
        self._newest_1: dict[int, int] = {}
        self._newest_2: dict[tuple[int, int], int] = {}
        tail = token_ids[-max_length:]
        self._prediction_start = len(tail)
        if prediction:
            # As if it followed the sequence so far, so that its first tokens are found too.
            self._extend((*tail, *prediction, _BOUNDARY))
        self._start = len(self._tokens)
        self._extend(token_ids)

    def catch_up(self, token_ids: Sequence[int]) -> None:
        """Add those tokens of the sequence, here given whole, that came since the last time."""
        self._extend(token_ids[len(self._tokens) - self._start :])

    def _extend(self, token_ids: Iterable[int]) -> None:
        previous = self._tokens[-1] if self._tokens else _BOUNDARY
        for token in token_ids:
            place = len(self._tokens)
            self._tokens.append(token)
            self._before_1.append(self._newest_1.get(token, -1))
            self._newest_1[token] = place
            pair = (previous, token)
            self._before_2.append(self._newest_2.get(pair, -1))
            self._newest_2[pair] = place
            previous = token

    def matches(self, num_matches: int, num_tokens: int) -> list[Match]:
        """Find the longest matches, the newer of equal ones first.

        Matches of a single token count only where there are no longer ones.

        Args:
            num_matches: Matches to return at most.
            num_tokens: Length of a continuation at most; it ends where the sequence does.
        """
        found: list[tuple[int, int]] = []
        for before in (self._before_2, self._before_1):
            place = before[-1] if before else -1
            for _ in range(_MAX_OCCURRENCES):
                if place < 0:
                    break
                found.append((-self._length(place), -place))
                place = before[place]
            if found:
                break
        return [
            Match(
                -length,
                tuple(self._continuation(-place + 1, num_tokens)),
                self._prediction_place(-place + 1),
            )
            for length, place in sorted(found)[:num_matches]
        ]

    def _prediction_place(self, start: int) -> int:
        is_inside = self._prediction_start <= start < self._start - 1
        return start - self._prediction_start if is_inside else -1

    def _length(self, place: int) -> int:
        """How many tokens up to `place` agree with the newest ones."""
        tokens, end = self._tokens, len(self._tokens) - 1
        length = 1
        while (
            length < self._max_length
            and length <= place
            and tokens[place - length] == tokens[end - length] != _BOUNDARY
        ):
            length += 1
        return length

    def _continuation(self, start: int, num_tokens: int) -> list[int]:
        copied = self._tokens[start : start + num_tokens]
        return copied[: copied.index(_BOUNDARY)] if _BOUNDARY in copied else copied


class LookupProposal:
    """Continuations of several matches as a trie; a state is a node of it.

    Where continuations part, the longest match's is distinguished from the others'.

    Args:
        matches: What was found, the longest first.
    """

    source = "lookup"

    def __init__(self, matches: Sequence[Match]) -> None:
        self._below: list[dict[int, int]] = [{}]
        self._length, self._is_longest, self._place = [0], [True], [-1]
        self._children: dict[int, list[Child]] = {}
        for match in matches:
            self._add(match)

    def _add(self, match: Match) -> None:
        node = 0
        for depth, token_id in enumerate(match.continuation):
            below = self._below[node].get(token_id)
            if below is None:
                below = len(self._below)
                self._is_longest.append(self._is_longest[node] and not self._below[node])
                self._below[node][token_id] = below
                self._below.append({})
                self._length.append(match.length + depth)
                self._place.append(-1)
            if self._place[below] < 0 <= match.prediction_place:
                self._place[below] = match.prediction_place + depth
            node = below

    def children(self, state: int) -> Sequence[Child]:
        """Tokens that followed there."""
        known = self._children.get(state)
        if known is None:
            known = self._children[state] = [
                self._child(token_id, node) for token_id, node in self._below[state].items()
            ]
        return known

    def _child(self, token_id: int, node: int) -> Child:
        where = self._length[node], self._is_longest[node]
        return Child(token_id, lookup_prior(*where), node, lookup_cell(*where), self._place[node])

    def state_after_other(self, state: int) -> int | None:
        """None: another token was not copied from there."""
        return None
