"""Every error of its own that the draft side raises on purpose.

ValueError
└── HeadsCheckpointError     a heads checkpoint is incomplete, damaged or of an unknown kind
    └── HeadsMismatchError   the heads were trained for another base model
"""


class HeadsCheckpointError(ValueError):
    """A heads checkpoint is missing, incomplete, damaged or of an unknown kind."""


class HeadsMismatchError(HeadsCheckpointError):
    """The draft heads were trained for another base model than the one that is loaded."""
