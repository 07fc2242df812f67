"""Every error of its own that training raises on purpose.

EuryaleError
└── TrainingError       a training command cannot go on
    ├── DataError       a data file is missing, broken or belongs to something else
    ├── RunError        an output directory or file holds another run, or its state is damaged
    └── DivergedError   the loss is no longer a number
"""

from server.errors import EuryaleError


class TrainingError(EuryaleError):
    """A training command cannot go on."""


class DataError(TrainingError):
    """A data file is missing, broken or belongs to something else; names the line."""


class RunError(TrainingError):
    """An output path holds another run, or a run's saved state is damaged."""


class DivergedError(TrainingError):
    """The loss is no longer a number."""
