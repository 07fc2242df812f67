"""Fixtures that all tests may use."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch loads its OpenMP runtime: threads that spin while they wait make tests beside another
# busy process many times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A command line compiles the model by default, which takes longer than most tests.
os.environ.setdefault("EURYALE_COMPILE", "off")

import pytest
import torch

from server.model.source import resolve_model
from tests.support.log_lines import LogLines


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The built-in model as a checkpoint directory; the cache's lock has it made once."""
    return Path(resolve_model("smollm2"))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> LogLines:
    """What Euryale logs during the test."""
    return LogLines(caplog)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from threads, and threads of a busy machine wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """What a command line in the test's process sets up writes to a stream that ends with it."""
    loggers = [logging.getLogger(), logging.getLogger("euryale")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        for handler in logger.handlers[:]:
            if handler not in handlers:
                logger.removeHandler(handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, or the last would run alone while other processes idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
