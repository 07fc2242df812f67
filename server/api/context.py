"""What every route needs: the engine, the options, and the time of the start."""

import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.api.config import ApiConfig
from server.api.errors import ModelNotFoundError
from server.api.token_texts import TokenTexts
from server.engine.async_engine import AsyncEngine
from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ApiContext:
    """The application's parts.

    Attributes:
        engine: Started and stopped by the application.
        config: The options.
        token_texts: How single tokens are written in log-probabilities.
        created_s: Unix time of the application's start, which OpenAI calls a model's creation.
    """

    engine: AsyncEngine
    config: ApiConfig
    token_texts: TokenTexts
    created_s: int

    @classmethod
    def of(cls, engine: AsyncEngine, config: ApiConfig) -> "ApiContext":
        """The parts of an application that starts now."""
        return cls(engine, config, TokenTexts(engine.info.tokenizer), int(time.time()))

    @property
    def model_name(self) -> str:
        """The only name that requests may give as `model`."""
        return self.config.served_model_name or self.engine.info.model_name

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.info.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output."""
        return self.engine.info.max_model_len

    def check_model(self, name: str) -> None:
        """Reject another model's name.

        Raises:
            ModelNotFoundError: If this server does not serve it.
        """
        if name != self.model_name:
            raise ModelNotFoundError(
                f"the model {name[:200]!r} does not exist; this server has {self.model_name!r}"
            )


def _context(request: Request) -> ApiContext:
    context = request.app.state.context
    assert isinstance(context, ApiContext)
    return context


Context = Annotated[ApiContext, Depends(_context)]
