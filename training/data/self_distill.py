"""Has the base model answer prompts, many conversations in flight, by the serving engine.

Owns the order of turns: the answer to a user turn stands in the next one's prompt. Knows no files.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from server.config import SamplingParams, SpeculationParams
from server.core.request import Request, RequestOutput
from server.engine.engine import Engine
from server.errors import InvalidRequestError
from training.data.distilled import AssistantTurn, DistilledConversation, Sampling
from training.data.prompts import Prompts

# A circle teaches a draft head nothing that its first two rounds did not.
MAX_PERIOD = 24
MIN_REPEATED_TOKENS = 48
_TOO_LONG = "context_length_exceeded"
# Looking for circles costs more than a token is worth, so it is not done for each.
_REPEATS_INTERVAL = 16


@dataclass(slots=True)
class _Dialogue:
    """A conversation in flight; the last fields are those of its open turn."""

    prompts: Prompts
    turns: list[AssistantTurn] = field(default_factory=list)
    prompt_token_ids: tuple[int, ...] = ()
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def finished(self) -> DistilledConversation:
        prompts = self.prompts
        return DistilledConversation(
            prompts.id, prompts.category, prompts.system, prompts.turns, tuple(self.turns)
        )


class SelfDistiller:
    """Runs conversations through an idle engine.

    Args:
        engine: Answers; by exact acceptance only, so drafts change no token.
        sampling: How every answer is drawn.
        method: Draft source.
        max_in_flight: Conversations at once.
    """

    def __init__(
        self, engine: Engine, sampling: Sampling, method: str = "none", max_in_flight: int = 64
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._speculation = SpeculationParams(method=method, acceptance="exact")
        self._max_in_flight = max_in_flight
        self._dialogues: dict[str, _Dialogue] = {}

    def run(
        self, prompts: Iterable[Prompts], on_tokens: Callable[[int], None]
    ) -> Iterator[DistilledConversation]:
        """Yield conversations as they finish, in no fixed order.

        A turn that does not fit the context, and one after a circle, ends its conversation early;
        a conversation without turns is one whose first prompt does not fit.

        Args:
            prompts: Conversations to answer; read lazily, so that they can end when there are
                enough tokens.
            on_tokens: Called with the number of new tokens of each step.

        Raises:
            InvalidRequestError: If the engine rejects a prompt for another reason than its length.
        """
        waiting = iter(prompts)
        while True:
            while len(self._dialogues) < self._max_in_flight:
                upcoming = next(waiting, None)
                if upcoming is None:
                    break
                dialogue = _Dialogue(upcoming)
                if not self._ask(dialogue):
                    yield dialogue.finished()
            if not self._dialogues:
                return
            outputs = self._engine.step()
            on_tokens(sum(len(output.token_ids) for output in outputs))
            for output in outputs:
                dialogue = self._dialogues[output.request_id]
                reason = self._take(dialogue, output)
                if reason is not None and not self._answered(dialogue, reason):
                    yield dialogue.finished()

    def _ask(self, dialogue: _Dialogue) -> bool:
        """Send the next user turn; False if there is none or it does not fit."""
        num_answers = len(dialogue.turns)
        if num_answers == len(dialogue.prompts.turns):
            return False
        token_ids = tuple(self._engine.tokenizer.apply_chat_template(_messages(dialogue)))
        request = Request(
            dialogue.prompts.id,
            token_ids,
            self._params(dialogue.prompts.id, num_answers),
            self._speculation,
        )
        try:
            self._engine.add_request(request)
        except InvalidRequestError as error:
            if error.code == _TOO_LONG:
                return False
            raise
        dialogue.prompt_token_ids = token_ids
        dialogue.token_ids, dialogue.texts = [], []
        self._dialogues[dialogue.prompts.id] = dialogue
        return True

    def _take(self, dialogue: _Dialogue, output: RequestOutput) -> str | None:
        """Add new tokens to the open turn; returns why it ended, if it did."""
        num_before = len(dialogue.token_ids) // _REPEATS_INTERVAL
        dialogue.token_ids += output.token_ids
        dialogue.texts.append(output.text)
        if output.finish_reason is not None:
            return output.finish_reason
        is_due = len(dialogue.token_ids) // _REPEATS_INTERVAL > num_before
        if self._sampling.stop_repeats and is_due and ends_in_circle(dialogue.token_ids):
            self._engine.abort(output.request_id)
            return "repeats"
        return None

    def _answered(self, dialogue: _Dialogue, reason: str) -> bool:
        """Close the open turn; returns whether the conversation goes on."""
        del self._dialogues[dialogue.prompts.id]
        dialogue.turns.append(
            AssistantTurn(
                dialogue.prompt_token_ids,
                tuple(dialogue.token_ids),
                "".join(dialogue.texts),
                reason,
            )
        )
        return reason != "repeats" and self._ask(dialogue)

    def _params(self, conversation_id: str, turn: int) -> SamplingParams:
        sampling = self._sampling
        # A seed of its own makes an answer the same, whatever else is in the batch.
        seed = _number(f"{sampling.seed}/{conversation_id}/{turn}")
        choice = _number(f"{sampling.seed}/{conversation_id}") % len(sampling.temperatures)
        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperatures[choice],
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
        )


def _number(key: str) -> int:
    """A signed 64-bit number that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)


def _messages(dialogue: _Dialogue) -> list[dict[str, str]]:
    prompts, messages = dialogue.prompts, []
    if prompts.system is not None:
        messages.append({"role": "system", "content": prompts.system})
    for question, turn in zip(prompts.turns, dialogue.turns, strict=False):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": turn.text})
    messages.append({"role": "user", "content": prompts.turns[len(dialogue.turns)]})
    return messages


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
