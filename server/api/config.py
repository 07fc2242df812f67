"""Options of the HTTP side, checked on construction."""

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from server.errors import ConfigError

LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """How the HTTP API answers.

    Attributes:
        served_model_name: Name that clients give as `model`; that of `--model` if not given.
        api_key: Bearer token that `/v1`, `/tokenize` and `/detokenize` ask for; none is asked for
            if not given.
        max_request_bytes: Longest request body, in bytes.

    Raises:
        ConfigError: If a value is out of range.
    """

    served_model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_request_bytes: int = 8 * 2**20

    def __post_init__(self) -> None:
        if self.served_model_name == "":
            raise ConfigError("served_model_name is empty; give a name or leave it out")
        if self.api_key == "":
            raise ConfigError("api_key is empty; give a key or leave it out")
        if self.max_request_bytes < 1:
            raise ConfigError(f"max_request_bytes is {self.max_request_bytes}; give at least 1")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the server process listens, queues, logs and ends.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        max_queue: Requests that may wait beyond those that run; more are answered with 429.
        drain_s: Seconds that running requests get to end after the first SIGTERM or SIGINT.
        log_level: Least severe messages that are logged; accesses are logged at `info`.

    Raises:
        ConfigError: If a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_queue: int = 256
    drain_s: float = 30.0
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; give 0 to 65535")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue is {self.max_queue}; give 0 or more")
        if not 0.0 <= self.drain_s <= 86400.0:
            raise ConfigError(f"drain_s is {self.drain_s}; give 0 to 86400 seconds")


def installed_version() -> str:
    """Version of the installed distribution; `unknown` when run from a bare source tree."""
    try:
        return version("euryale")
    except PackageNotFoundError:
        return "unknown"
