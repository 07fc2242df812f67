"""A model with its draft heads, to be called from Python."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from server.config import EngineConfig, SamplingParams, SpeculationParams
from server.core.completion import Completion, join_outputs
from server.core.request import Request, RequestOutput
from server.engine.engine import Engine

Conversation = Sequence[Mapping[str, Any]]

_SAMPLING = SamplingParams()
_SPECULATION = SpeculationParams()


class LLM:
    """A model with its draft heads.

    Calls may overlap: streams that are open run in the same steps as later calls. One thread at a
    time may call an instance.

    Args:
        model: Hub id, local directory, `.gguf` file or the built-in `smollm2`.
        heads: Directory of draft heads; `auto` takes those that ship for the model, if any; `none`
            decodes without heads.
        options: Further fields of `server.config.EngineConfig`, such as `quantization="int8"` or
            `compile="auto"`.

    Raises:
        ConfigError: If an option is wrong, or a directory of heads is missing.
        ModelError: If the model cannot be loaded or is not supported.
        HeadsCheckpointError: If the heads are damaged or belong to another model.
        TypeError: If there is no such option.
    """

    def __init__(self, model: str = "smollm2", heads: str = "auto", **options: Any) -> None:
        self._engine = Engine.from_config(EngineConfig(model=model, heads=heads, **options))
        self._numbers = count()
        # Outputs that are not taken yet, of all requests that have not ended.
        self._outputs: dict[str, deque[RequestOutput]] = {}

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: SamplingParams = _SAMPLING,
        speculation: SpeculationParams = _SPECULATION,
    ) -> list[Completion]:
        """Continue texts as they stand, all in one batch.

        Args:
            prompts: A text or several.
            sampling: How tokens are drawn, and how many.
            speculation: What drafts are made of, and how they are accepted.

        Returns:
            One completion for each prompt, in the same order.

        Raises:
            InvalidRequestError: If a prompt is empty or too long, or a parameter does not fit the
                model; none of the prompts is answered then.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        return self._completions([self._encoded(text) for text in texts], sampling, speculation)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling: SamplingParams = _SAMPLING,
        speculation: SpeculationParams = _SPECULATION,
    ) -> list[Completion]:
        """Answer conversations, all in one batch.

        Args:
            messages: A conversation or several; mappings with `role` and `content`.
            sampling: As for `generate`.
            speculation: As for `generate`.

        Returns:
            One completion for each conversation, in the same order.

        Raises:
            InvalidRequestError: As for `generate`; or if the model has no chat template, or it
                rejects the messages.
        """
        is_one = all(isinstance(item, Mapping) for item in messages)
        conversations: Any = [messages] if is_one else messages
        prompts = [self._encoded(conversation) for conversation in conversations]
        return self._completions(prompts, sampling, speculation)

    def stream(
        self,
        prompt: str | Conversation,
        sampling: SamplingParams = _SAMPLING,
        speculation: SpeculationParams = _SPECULATION,
    ) -> Iterator[RequestOutput]:
        """Continue a text or answer a conversation, step by step.

        A stream that is closed before its end, or is no longer referenced, ends the request.

        Args:
            prompt: A text, or the messages of a conversation.
            sampling: As for `generate`.
            speculation: As for `generate`.

        Yields:
            What each step brought: `text` is the new text, which may be empty, and `stats` of the
            last output has the counts of the whole request.

        Raises:
            InvalidRequestError: As for `chat`, with the first output.
        """
        [request] = self._requests([self._encoded(prompt)], sampling, speculation)
        try:
            self._engine.add_request(request)
            self._outputs[request.request_id] = deque()
            yield from self._take(request)
        finally:
            self._forget([request])

    def _encoded(self, prompt: str | Conversation) -> list[int]:
        tokenizer = self._engine.tokenizer
        if isinstance(prompt, str):
            return tokenizer.encode(prompt)
        return tokenizer.apply_chat_template(prompt)

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        speculation: SpeculationParams,
    ) -> list[Request]:
        return [
            Request(f"llm-{next(self._numbers)}", tuple(token_ids), sampling, speculation)
            for token_ids in prompts
        ]

    def _completions(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        speculation: SpeculationParams,
    ) -> list[Completion]:
        requests = self._requests(prompts, sampling, speculation)
        try:
            for request in requests:
                self._engine.add_request(request)
                self._outputs[request.request_id] = deque()
            return [join_outputs([*self._take(request)]) for request in requests]
        finally:
            self._forget(requests)

    def _take(self, request: Request) -> Iterator[RequestOutput]:
        """Yield a request's outputs; keeps those of other requests for their own calls."""
        waiting = self._outputs[request.request_id]
        while True:
            while not waiting:
                for output in self._engine.step():
                    self._outputs[output.request_id].append(output)
            output = waiting.popleft()
            yield output
            if output.finish_reason is not None:
                return

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._engine.abort(request.request_id)
            self._outputs.pop(request.request_id, None)
