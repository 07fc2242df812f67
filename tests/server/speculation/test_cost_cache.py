"""Step costs on disk: taken where they hold, measured again wherever there is doubt."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from heads.packed_product import PackedProduct
from server.device.base import Accelerated, DraftProducts
from server.speculation.cost_cache import CostCache, cached_costs, cost_key
from server.speculation.cost_model import CostModel, Probes
from tests.support.engine_tools import make_engine
from tests.support.log_lines import LogLines

pytestmark = pytest.mark.slow

STEP_S = 0.01
COSTS = CostModel((1, 2, 4), (STEP_S, 0.011, 0.012), 0.003, 16, 0.001, 0.002, 0.0001)
KEY: dict[str, object] = {"model": {"samples": [0.1, 0.2]}, "threads": 2}


class Timed:
    """Probes whose steps take a fixed time and are recorded."""

    def __init__(self, step_s: float = STEP_S) -> None:
        self.asked: list[int] = []
        self._step_s = step_s

    def probes(self) -> Probes:
        return Probes(self._step, self._wait, self._wait, None, 16, 0, 1, 4)

    def _step(self, num_tokens: int) -> None:
        self.asked.append(num_tokens)
        self._wait()

    def _wait(self) -> None:
        time.sleep(self._step_s)

    @property
    def was_measured(self) -> bool:
        return 4 in self.asked


@pytest.fixture
def cache(tmp_path: Path) -> CostCache:
    return CostCache(tmp_path / "deep" / "costs", KEY)


def test_what_was_kept_comes_back(cache: CostCache) -> None:
    assert cache.load() is None
    cache.save(COSTS)
    assert cache.load() == COSTS
    assert [path.name for path in cache.directory.iterdir()] == [cache.path.name]


def test_the_second_start_takes_what_the_first_measured(cache: CostCache, log: LogLines) -> None:
    first, second = Timed(), Timed()
    measured = cached_costs(cache, first.probes())
    assert first.was_measured
    log.take()
    assert cached_costs(cache, second.probes()) == measured
    assert not second.was_measured
    assert log.take() == [f"step cost as measured before (kept in {cache.path})"]


def test_measuring_again_can_be_asked_for(cache: CostCache) -> None:
    cache.save(COSTS)
    timed = Timed()
    found = cached_costs(cache, timed.probes(), remeasure=True)
    assert timed.was_measured
    assert cache.load() == found != COSTS


@pytest.mark.parametrize("step_s", [STEP_S / 4, STEP_S * 4])
def test_a_machine_of_another_speed_is_measured_again(
    cache: CostCache, step_s: float, log: LogLines
) -> None:
    cache.save(COSTS)
    timed = Timed(step_s)
    found = cached_costs(cache, timed.probes())
    assert timed.was_measured
    assert "but took 10.0 ms" in log.take()[0]
    assert cache.load() == found


DAMAGED = {
    "empty": "",
    "no json": "{",
    "a list": "[]",
    "no costs": json.dumps({"key": KEY}),
    "an unknown field": json.dumps({"key": KEY, "costs": {"speed": 1}}),
    "one size": json.dumps({"key": KEY, "costs": {"num_tokens": [1], "step_s": [1.0]}}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_measured_again_with_a_note(
    cache: CostCache, name: str, log: LogLines
) -> None:
    cache.save(COSTS)
    cache.path.write_text(DAMAGED[name])
    timed = Timed()
    found = cached_costs(cache, timed.probes())
    assert f"{cache.path} is damaged" in log.take()[0]
    assert cache.load() == found


@pytest.mark.parametrize(
    "changes",
    [
        {"step_s": (0.0, 1.0, 2.0)},
        {"step_s": (2.0, 1.0, 3.0)},
        {"step_s": (1.0, 2.0)},
        {"step_s": (1.0, 2.0, float("nan"))},
        {"step_s": (1.0, 2.0, "3")},
        {"num_tokens": (1, 4, 2)},
        {"draft_s": -1.0},
        {"draft_s": None},
        {"kv_token_s": float("inf")},
    ],
)
def test_costs_that_cannot_be_are_damage(cache: CostCache, changes: dict[str, object]) -> None:
    cache.save(replace(COSTS, **changes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is damaged"):
        cache.load()


def test_a_file_of_something_else_is_measured_again(cache: CostCache, log: LogLines) -> None:
    cache.save(COSTS)
    other = replace(cache, key={**KEY, "threads": 1})
    assert other.path != cache.path
    cache.path.rename(other.path)
    timed = Timed()
    cached_costs(other, timed.probes())
    assert timed.was_measured
    assert "belongs to another model" in log.take()[0]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, log: LogLines) -> None:
    (tmp_path / "file").write_text("")
    timed = Timed()
    cache = CostCache(tmp_path / "file" / "costs", KEY)
    assert cached_costs(cache, timed.probes()).num_tokens == (1, 2, 4)
    assert "cannot be" in log.take()[-1]


class TestKey:
    def key(
        self, block_size: int = 4, max_nodes: int = 8, is_compiled: bool = False
    ) -> dict[str, object]:
        loaded = make_engine().loaded
        products = DraftProducts(PackedProduct, lambda module: None)
        accelerated = Accelerated("sdpa", products, "none", is_compiled, {"layers": is_compiled})
        return cost_key(loaded, None, block_size, max_nodes, Timed().probes(), accelerated)

    def test_is_json_and_the_same_for_the_same_server(self) -> None:
        assert json.dumps(self.key()) == json.dumps(self.key())

    def test_tells_what_costs_depend_on(self) -> None:
        assert self.key() != self.key(block_size=8) != self.key(max_nodes=7)
        assert self.key() != self.key(is_compiled=True)
        assert {"model", "heads", "dtype", "device", "num_threads", "torch"} <= set(self.key())
