"""Hidden states that the engine computes anyway while it writes answers, kept for training.

They are those of teacher forcing up to rounding, because other tokens are in the same step.
"""

from collections.abc import Sequence

from torch import Tensor

from training.data.dataset import Document, TokenizedConversation, conversation_documents
from training.data.distilled import DistilledConversation
from training.states.document_states import DocumentStates


class HiddenCapture:
    """Connects an engine, which knows requests, with states on disk, which belong to documents."""

    def __init__(self) -> None:
        self._taken: dict[tuple[int, ...], Tensor] = {}
        self._documents: list[Document] = []
        self._states: list[Tensor] = []
        self._num_tokens = 0

    def take(self, token_ids: Sequence[int], hidden_XD: Tensor) -> None:
        """Hold the states of a request that has ended; an `Engine` calls this."""
        self._taken[tuple(token_ids)] = hidden_XD.to("cpu")

    def keep(self, conversation: DistilledConversation, kept: DocumentStates) -> None:
        """Keep the states of a finished conversation, once there are enough for a file.

        An answer that ended before its states were computed has none; training computes them.

        Raises:
            ModelError: If states do not fit the type that is kept.
            RunError: If the disk is full or fails.
        """
        turns = tuple((list(t.prompt_token_ids), list(t.token_ids)) for t in conversation.turns)
        taken = {
            tuple(prompt + answer): self._taken.pop(tuple(prompt + answer), None)
            for prompt, answer in turns
        }
        tokenized = TokenizedConversation(conversation.id, conversation.category, turns, "")
        for document in kept.missing(conversation_documents(tokenized)):
            hidden_XD = taken[tuple(document.token_ids_T.tolist())]
            if hidden_XD is not None:
                self._documents.append(document)
                self._states.append(hidden_XD)
                self._num_tokens += len(hidden_XD)
        if self._num_tokens >= kept.max_tokens:
            self.flush(kept)

    def flush(self, kept: DocumentStates) -> None:
        """Keep all states that wait for a file to be full; see `keep`."""
        if self._documents:
            kept.add(self._documents, self._states)
        self._documents, self._states, self._num_tokens = [], [], 0
