"""What a bench raises when it cannot run as asked."""

from server.errors import EuryaleError


class BenchError(EuryaleError):
    """A bench's data or options are wrong; the message names the value and the remedy."""
