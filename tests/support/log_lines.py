"""What Euryale writes to its log."""

import logging

import pytest


class LogLines:
    """The messages of Euryale's loggers while a test runs, from level INFO on."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="euryale")
        self._caplog = caplog

    def take(self) -> list[str]:
        """The messages since the last call."""
        messages = [
            record.getMessage()
            for record in self._caplog.records
            if record.name.startswith("euryale")
        ]
        self._caplog.clear()
        return messages
