"""A run's metrics in the experiment trackers that Accelerate knows: TensorBoard, W&B, MLflow, ...

Each package is loaded when a run begins that asks for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from training.errors import RunError

# What keeps a tracker from showing the steps that a resumed run repeats, where it can.
_RESUMING: Mapping[str, Callable[[int], Mapping[str, Any]]] = {
    "tensorboard": lambda first_step: {"purge_step": first_step + 1},
}


@dataclass(frozen=True, slots=True)
class Tracking:
    """Which trackers get a run's metrics.

    Attributes:
        names: Trackers, as Accelerate names them.
        directory: Gets the files of those that write any.
        run_name: What the run is called there; a part of the path of its files.

    Raises:
        RunError: If a tracker is unknown or not installed.
    """

    names: Sequence[str]
    directory: Path
    run_name: str

    def __post_init__(self) -> None:
        installed = [str(name) for name in get_available_trackers()]
        for name in self.names:
            if name not in LOGGER_TYPE_TO_CLASS:
                known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
                raise RunError(f"track is {name!r}, which is no tracker; give one of {known}")
            if name not in installed:
                raise RunError(
                    f"track is {name!r}, whose package is not installed; pip install {name}"
                )

    def part(self, name: str) -> "Tracking":
        """Return the tracking of a run inside of this one's directory."""
        return replace(self, run_name=f"{self.run_name}/{name}")


NO_TRACKING = Tracking((), Path(), "")


@contextmanager
def open_trackers(tracking: Tracking, first_step: int) -> Iterator[list[GeneralTracker]]:
    """Start the trackers of a run, for the steps after `first_step`.

    Raises:
        RunError: If a tracker cannot be started.
    """
    trackers: list[GeneralTracker] = []
    try:
        for name in tracking.names:
            trackers.append(_started(name, tracking, first_step))
        yield trackers
    finally:
        for tracker in trackers:
            tracker.finish()


def _started(name: str, tracking: Tracking, first_step: int) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = [str(tracking.directory)] if kind.requires_logging_directory else []
    more = _RESUMING[name](first_step) if name in _RESUMING else {}
    try:
        tracker = kind(tracking.run_name, *place, **more)
        tracker.start()
    except OSError as error:
        raise RunError(
            f"{tracking.directory} cannot be written by {name}: {error.strerror}; give another "
            "--track-dir"
        ) from error
    return tracker


def flat_figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return all figures of a step but its number; one of several values has a name for each."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            found |= {f"{name}/{index}": item for index, item in enumerate(value)}
        elif isinstance(value, Mapping):
            found |= {f"{name}/{key}": item for key, item in value.items()}
        elif name != "step":
            found[name] = value
    return found
