"""A conversation as training needs it: for each answer all tokens before it, and its own."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """The answers of one conversation.

    Attributes:
        turns: Pairs of everything before an answer and the answer, as token ids.
        where: File and line, for messages.
    """

    id: str
    category: str
    turns: tuple[tuple[list[int], list[int]], ...]
    where: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(answer) for _, answer in self.turns)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that a model must take."""
        return max(len(prompt) + len(answer) for prompt, answer in self.turns)
