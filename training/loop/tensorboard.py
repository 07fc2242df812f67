"""A run's metrics as TensorBoard has them; `tensorboard` is loaded on first use."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import RunError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def summary_writer() -> "type[SummaryWriter]":
    """Return the writer's class.

    Raises:
        RunError: If TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError(
            "--tensorboard needs the package tensorboard, which is not installed; "
            "pip install 'euryale[tensorboard]'"
        ) from error
    return SummaryWriter


class TensorBoardLog:
    """Writes metrics as scalars, each at its step.

    Args:
        directory: Of one run; steps after `first_step` that it holds are hidden from the reader.
        first_step: Last step of the run so far.

    Raises:
        RunError: If TensorBoard is not installed, or the directory cannot be written to.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        writer = summary_writer()
        try:
            self._writer = writer(str(directory), purge_step=first_step + 1)
        except OSError as error:
            raise RunError(
                f"{directory} cannot be written: {error.strerror}; give another --tensorboard"
            ) from error

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of one step; they are on their way to the disk on return."""
        for name, value in _scalars(metrics):
            self._writer.add_scalar(name, value, metrics["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values; what has several values gives a name to each."""
    for name, value in metrics.items():
        if isinstance(value, list):
            yield from ((f"{name}/{index}", item) for index, item in enumerate(value))
        elif isinstance(value, Mapping):
            yield from ((f"{name}/{key}", item) for key, item in value.items())
        elif name != "step":
            yield name, value
