"""Work on a thread that ends with it."""

import threading

import pytest

from server.engine.own_thread import in_own_thread
from server.errors import ConfigError


def test_the_result_comes_from_another_thread_that_has_ended() -> None:
    thread = in_own_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_what_it_raises_is_raised_here() -> None:
    def fail() -> None:
        raise ConfigError("num_blocks is 0; give at least 1")

    with pytest.raises(ConfigError, match="num_blocks is 0"):
        in_own_thread(fail)
