"""The root of all errors that Euryale raises on purpose, and the draft side's own.

EuryaleError
├── HeadsCheckpointError     a heads checkpoint is missing, damaged or of an unknown kind
│   └── HeadsMismatchError   draft heads belong to another base model
└── ...                      the others: `server.errors`, `training.errors`, `bench.errors`
"""


class EuryaleError(Exception):
    """Base of all errors that Euryale raises on purpose."""


class HeadsCheckpointError(EuryaleError):
    """A heads checkpoint is missing, incomplete, damaged or of an unknown kind."""


class HeadsMismatchError(HeadsCheckpointError):
    """The draft heads were trained for another base model than the one that is loaded."""
