"""What a bench raises when it cannot run as asked."""


class BenchError(Exception):
    """A bench's data or options are wrong; the message names the value and the remedy."""
