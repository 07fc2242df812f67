"""Every error that the server raises on purpose; those of the draft side are re-exported.

EuryaleError
├── ConfigError            a server option or a file it names is wrong
├── ModelError             the base model cannot be loaded or is not supported
├── CompilationError       something cannot be compiled; the model runs all the same
├── HeadsCheckpointError   a heads checkpoint is missing or damaged
│   └── HeadsMismatchError draft heads belong to another base model
├── InvalidRequestError    a request's parameter is wrong (HTTP 400)
├── QueueFullError         the waiting queue is full (HTTP 429)
├── EngineStoppedError     the engine drains, has stopped or has failed (HTTP 503)
├── OutOfBlocksError       `server.kv`: the KV cache has too few free blocks; the engine preempts
├── TrainingError          `training.errors`: a training command cannot go on
└── BenchError             `bench.errors`: a bench's data or options are wrong
"""

from heads.errors import EuryaleError, HeadsCheckpointError, HeadsMismatchError

__all__ = [
    "CompilationError",
    "ConfigError",
    "EngineStoppedError",
    "EuryaleError",
    "HeadsCheckpointError",
    "HeadsMismatchError",
    "InvalidRequestError",
    "ModelError",
    "QueueFullError",
]


class ConfigError(EuryaleError):
    """A server option, or a file that it names, is wrong."""


class ModelError(EuryaleError):
    """The base model cannot be loaded or is of an unsupported kind."""


class CompilationError(EuryaleError):
    """The base model, or code of ours, cannot be compiled; the model runs all the same."""


class InvalidRequestError(EuryaleError):
    """A request's parameter is wrong.

    Attributes:
        param: Name of the offending parameter as the client wrote it, or None.
        code: Machine-readable reason, as OpenAI's API has them, or None.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(EuryaleError):
    """The waiting queue is full.

    Attributes:
        retry_after_s: Seconds after which a retry is likely to be admitted.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStoppedError(EuryaleError):
    """The engine takes no more requests: it drains, has stopped or has failed."""
