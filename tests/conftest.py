"""Fixtures that all tests may use."""

import os
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files come first, or the last of them would run alone while other processes idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
