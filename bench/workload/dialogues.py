"""Plays conversations turn by turn: the model's own answer is part of the next turn's context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.errors import BenchError
from bench.workload.conversations import Conversation
from bench.workload.tracing import Trace, run_requests
from server.config import SamplingParams, SpeculationParams
from server.core.request import Request
from server.engine.engine import Engine
from server.errors import InvalidRequestError
from server.tokenizer import Tokenizer

_TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class Turn:
    """A user turn with everything before it, ready to be answered.

    Attributes:
        messages: The dialogue up to the turn, of which `prompt_token_ids` is the rendering.
    """

    conversation: Conversation
    index: int
    prompt_token_ids: tuple[int, ...]
    messages: tuple[dict[str, str], ...] = ()

    @property
    def key(self) -> str:
        """Identifies the turn among all turns of a file."""
        return f"{self.conversation.line}.{self.index + 1}"

    def request(self, sampling: SamplingParams, speculation: SpeculationParams) -> Request:
        """Ask the engine for an answer; the turn's key is the request's id."""
        return Request(self.key, self.prompt_token_ids, sampling, speculation)


MakeRequest = Callable[[Turn], Request]


@dataclass(frozen=True, slots=True)
class SkippedTurn:
    """A turn that does not fit the context; it and the conversation's later turns are left out."""

    line: int
    turn: int
    reason: str


@dataclass(frozen=True, slots=True)
class AnsweredTurns:
    """Outcome of `answer_turns`; `turns` and `traces` go together, in file order."""

    turns: tuple[Turn, ...]
    traces: tuple[Trace, ...]
    skipped: tuple[SkippedTurn, ...]


def make_turn(tokenizer: Tokenizer, conversation: Conversation, answers: Sequence[str]) -> Turn:
    """Render the turn that follows the given answers.

    Args:
        tokenizer: Its chat template renders the dialogue.
        conversation: Has more turns than there are answers.
        answers: The model's answers to the turns before.

    Raises:
        InvalidRequestError: If the tokenizer has no chat template or rejects the dialogue.
    """
    messages: list[dict[str, str]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for question, answer in zip(conversation.turns, answers, strict=False):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": conversation.turns[len(answers)]})
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return Turn(conversation, len(answers), tuple(token_ids), tuple(messages))


def skip_if_too_long(engine: Engine, turn: Turn, request: Request) -> SkippedTurn | None:
    """Why a turn must be skipped, or None if the engine can answer it in full.

    Raises:
        InvalidRequestError: If the engine rejects the request for anything but its length.
    """
    try:
        engine.limits.check(request)
    except InvalidRequestError as error:
        if error.code != _TOO_LONG:
            raise
        return SkippedTurn(turn.conversation.line, turn.index + 1, str(error))
    return None


def first_turns(
    engine: Engine, conversations: Sequence[Conversation], sampling: SamplingParams
) -> tuple[list[Turn], tuple[SkippedTurn, ...]]:
    """The first turn of each conversation that fits the context, and those that do not.

    Raises:
        BenchError: If none fits.
    """
    turns: list[Turn] = []
    skipped: list[SkippedTurn] = []
    for conversation in conversations:
        turn = make_turn(engine.tokenizer, conversation, [])
        request = turn.request(sampling, SpeculationParams(method="none"))
        obstacle = skip_if_too_long(engine, turn, request)
        if obstacle is None:
            turns.append(turn)
        else:
            skipped.append(obstacle)
    if not turns:
        raise BenchError("no prompt fits the model's context; give shorter prompts")
    return turns, tuple(skipped)


def answer_turns(
    engine: Engine,
    conversations: Sequence[Conversation],
    make_request: MakeRequest,
    on_done: Callable[[], None],
) -> AnsweredTurns:
    """Answer every turn of every conversation, many conversations in flight.

    Args:
        engine: Idle before and after.
        conversations: With distinct lines.
        make_request: Makes a turn's request, with the turn's key as its id.
        on_done: Called once a conversation is through.

    Raises:
        BenchError: If not a single turn fits the context.
    """
    turns: dict[str, Turn] = {}
    answers: dict[int, list[str]] = {c.line: [] for c in conversations}
    skipped: list[SkippedTurn] = []

    def next_request(conversation: Conversation) -> Request | None:
        given = answers[conversation.line]
        if len(given) < len(conversation.turns):
            turn = make_turn(engine.tokenizer, conversation, given)
            request = make_request(turn)
            obstacle = skip_if_too_long(engine, turn, request)
            if obstacle is None:
                turns[turn.key] = turn
                return request
            skipped.append(obstacle)
        on_done()
        return None

    def follow_up(key: str, trace: Trace) -> Request | None:
        conversation = turns[key].conversation
        answers[conversation.line].append(trace.text)
        return next_request(conversation)

    first = [next_request(conversation) for conversation in conversations]
    if not turns:
        raise BenchError("no prompt fits the model's context; give shorter ones")
    traces = run_requests(engine, [r for r in first if r is not None], follow_up)
    ordered = sorted(turns.values(), key=lambda t: (t.conversation.line, t.index))
    return AnsweredTurns(
        tuple(ordered), tuple(traces[turn.key] for turn in ordered), tuple(skipped)
    )


def answer_again(
    engine: Engine, turns: Sequence[Turn], make_request: MakeRequest, on_done: Callable[[], None]
) -> list[Trace]:
    """Answer given turns in another way; traces come in the turns' order."""

    def follow_up(key: str, trace: Trace) -> None:
        on_done()

    traces = run_requests(engine, [make_request(turn) for turn in turns], follow_up)
    return [traces[turn.key] for turn in turns]
