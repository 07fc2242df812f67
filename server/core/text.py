"""A sequence's growing text: incremental decoding, stop strings, nothing emitted too early.

Text is held back while it could still become part of a stop string, and while a character is
incomplete.
"""

from collections.abc import Sequence

from server.tokenizer import IncrementalDetokenizer


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that begins one of the stop strings."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        suffix = text[-length:]
        if any(stop.startswith(suffix) for stop in stops):
            return length
    return 0


class TextStream:
    """Turns tokens into text that is safe to emit.

    Attributes:
        is_stopped: Whether a stop string was found; the text ends before it.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer, stops: Sequence[str]) -> None:
        self.is_stopped = False
        self._detokenizer = detokenizer
        self._stops = stops
        self._pending = ""
        self._ready: list[str] = []

    def add(self, token_id: int) -> str:
        """Append a token.

        Returns:
            The token's own piece of text, whether or not it can be emitted yet.
        """
        piece = self._detokenizer.add(token_id)
        self._append(piece)
        return piece

    def take(self) -> str:
        """The text that became safe to emit since the last call."""
        text = "".join(self._ready)
        self._ready.clear()
        return text

    def finish(self) -> None:
        """Release all held text; no token follows."""
        if not self.is_stopped:
            self._append(self._detokenizer.flush())
        if not self.is_stopped:
            self._ready.append(self._pending)
        self._pending = ""

    def _append(self, piece: str) -> None:
        if not piece:
            return
        if not self._stops:
            self._ready.append(piece)
            return
        self._pending += piece
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._ready.append(self._pending[: min(found)])
            self._pending = ""
            return
        safe = len(self._pending) - _held_back(self._pending, self._stops)
        self._ready.append(self._pending[:safe])
        self._pending = self._pending[safe:]
