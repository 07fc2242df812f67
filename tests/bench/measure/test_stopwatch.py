import time

import pytest
import torch

from bench.measure.stopwatch import Stopwatch, device_waiter


def do_nothing() -> None:
    pass


def test_a_part_excludes_the_parts_inside_it() -> None:
    watch = Stopwatch(do_nothing)
    with watch.part("outer"):
        time.sleep(0.02)
        with watch.part("inner"):
            time.sleep(0.05)
    laps = watch.lap()
    assert 0.02 <= laps["outer"] < 0.05 <= laps["inner"]


def test_self_times_add_up_to_the_whole() -> None:
    watch = Stopwatch(do_nothing)
    start = time.perf_counter()
    with watch.part("a"):
        for _ in range(3):
            with watch.part("b"):
                with watch.part("c"):
                    time.sleep(0.002)
                with watch.part("c"):
                    time.sleep(0.002)
    elapsed_s = time.perf_counter() - start
    assert sum(watch.lap().values()) == pytest.approx(elapsed_s, rel=0.05)


def test_a_lap_starts_again_at_zero() -> None:
    watch = Stopwatch(do_nothing)
    with watch.part("a"):
        pass
    assert watch.lap().keys() == {"a"}
    assert watch.lap() == {}


def test_a_timed_function_works_as_before() -> None:
    watch = Stopwatch(do_nothing)

    def add(a: int, *, b: int) -> int:
        return a + b

    timed = watch.timed("add", add)
    assert timed(1, b=2) == 3
    assert timed.__name__ == "add"
    assert watch.lap()["add"] > 0.0


def test_an_error_passes_through_and_is_timed() -> None:
    watch = Stopwatch(do_nothing)
    with pytest.raises(ValueError, match="no"), watch.part("outer"), watch.part("inner"):
        raise ValueError("no")
    assert watch.lap().keys() == {"outer", "inner"}


def test_device_parts_wait_for_the_device_inside_their_time() -> None:
    waits: list[int] = []

    def wait() -> None:
        waits.append(1)
        time.sleep(0.02)

    watch = Stopwatch(wait)
    with watch.part("host"), watch.part("device", on_device=True):
        pass
    assert waits == [1]
    laps = watch.lap()
    assert laps["host"] < 0.02 <= laps["device"]


def test_there_is_nothing_to_wait_for_on_a_cpu() -> None:
    device_waiter(torch.device("cpu"))()
