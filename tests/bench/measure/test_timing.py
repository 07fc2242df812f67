import pytest
import torch

from bench.measure.timing import Timing, device_waiter, speed, speedup, time_request
from server.config import SamplingParams, SpeculationParams
from server.core.request import Request
from server.engine.engine import Engine


def test_a_request_splits_into_its_first_token_and_the_rest() -> None:
    timing = Timing(num_tokens=11, request_s=3.0, first_token_s=1.0)
    assert (timing.decode_s, timing.num_decode_tokens) == (2.0, 10)


def test_speed_is_all_tokens_by_all_seconds() -> None:
    found = speed([Timing(11, 3.0, 1.0), Timing(31, 7.0, 2.0)])
    assert found.tokens_per_s == pytest.approx(42 / 10)
    assert found.decode_tokens_per_s == pytest.approx(40 / 7)
    assert found.median_first_token_s == 1.5


def test_speedups_come_as_totals_and_medians() -> None:
    fast = [Timing(11, 2.0, 1.0), Timing(11, 1.0, 0.5), Timing(11, 10.0, 5.0)]
    slow = [Timing(11, 4.0, 1.0), Timing(11, 3.0, 0.5), Timing(11, 10.0, 5.0)]
    found = speedup(fast, slow)
    assert found.total == pytest.approx(17 / 13)
    assert found.median == pytest.approx(2.0)
    assert found.decode_total == pytest.approx(10.5 / 6.5)
    assert found.decode_median == pytest.approx(3.0)


def test_outputs_of_different_lengths_are_compared_by_their_rates() -> None:
    assert speedup([Timing(20, 2.0, 1.0)], [Timing(5, 1.0, 0.5)]).total == pytest.approx(2.0)


def test_one_token_outputs_have_no_decode_speed() -> None:
    found = speedup([Timing(1, 1.0, 1.0)], [Timing(1, 2.0, 2.0)])
    assert (found.total, found.decode_total, found.decode_median) == (2.0, 0.0, 0.0)
    assert speed([Timing(1, 1.0, 1.0)]).decode_tokens_per_s == 0.0


def test_a_request_is_timed_on_the_engine(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    request = Request("r", (5, 6, 7), sampling, SpeculationParams())
    timing, trace = time_request(engine, request)
    assert timing.num_tokens == len(trace.token_ids) == 12
    assert 0.0 < timing.first_token_s < timing.request_s
    assert not engine.has_unfinished


def test_there_is_nothing_to_wait_for_on_a_cpu() -> None:
    device_waiter(torch.device("cpu"))()
