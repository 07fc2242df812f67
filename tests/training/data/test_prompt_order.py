from collections import Counter

import pytest

from training.data.prompt_order import PromptOrder, check_weights
from training.data.prompts import Prompts
from training.errors import DataError

LENGTHS = {"short": 10, "long": 100, "middle": 40}


def prompts(num_each: int = 400) -> list[Prompts]:
    return [
        Prompts(f"{category}-{index}", category, ("question",))
        for index in range(num_each)
        for category in LENGTHS
    ]


def answered(order: PromptOrder, num_tokens: int, num_in_flight: int = 8) -> Counter[str]:
    """Answer prompts with so many in flight; returns the tokens of each category."""
    counts: Counter[str] = Counter()
    waiting = iter(order)
    in_flight: list[Prompts] = []
    while counts.total() < num_tokens:
        while len(in_flight) < num_in_flight and (upcoming := next(waiting, None)) is not None:
            in_flight.append(upcoming)
        if not in_flight:
            break
        done = in_flight.pop(0)
        order.finish(done.category, LENGTHS[done.category])
        counts[done.category] += LENGTHS[done.category]
    return counts


def test_without_weights_the_order_is_that_of_the_file() -> None:
    given = prompts(5)
    assert list(PromptOrder(given, None)) == given


def test_even_weights_give_even_tokens_though_answers_differ_in_length() -> None:
    counts = answered(PromptOrder(prompts(), {}), 9000)
    assert all(count == pytest.approx(3000, rel=0.1) for count in counts.values())


def test_shares_follow_the_weights_wherever_the_run_ends() -> None:
    for num_tokens in (4000, 8000):
        counts = answered(PromptOrder(prompts(), {"long": 2.0, "short": 0.5}), num_tokens)
        assert counts["long"] / counts["middle"] == pytest.approx(2.0, rel=0.2)
        assert counts["short"] / counts["middle"] == pytest.approx(0.5, rel=0.2)


def test_a_weight_of_zero_leaves_a_category_out() -> None:
    taken = list(PromptOrder(prompts(4), {"long": 0.0}))
    assert {item.category for item in taken} == {"short", "middle"}
    assert len(taken) == 8


def test_each_prompt_is_handed_out_once_and_in_file_order_within_its_category() -> None:
    given = prompts(7)
    taken = list(PromptOrder(given, {"long": 3.0}))
    assert sorted(item.id for item in taken) == sorted(item.id for item in given)
    for category in LENGTHS:
        of_category = [item for item in taken if item.category == category]
        assert of_category == [item for item in given if item.category == category]


def test_a_category_that_runs_out_leaves_the_rest_to_the_others() -> None:
    few = [item for item in prompts(200) if item.category != "long" or item.id == "long-0"]
    counts = answered(PromptOrder(few, {}), 4000)
    assert counts["long"] == 100
    assert counts["short"] == pytest.approx(counts["middle"], rel=0.1)


def test_answers_of_an_earlier_run_count() -> None:
    order = PromptOrder(prompts(), {})
    for _ in range(30):
        order.count("long", 100)
    counts = answered(order, 6000)
    assert counts["long"] <= 300
    assert counts["short"] == pytest.approx(counts["middle"], rel=0.1)


def test_an_earlier_run_may_have_answered_a_whole_category() -> None:
    order = PromptOrder([item for item in prompts(3) if item.category == "short"], {})
    order.count("long", 100)
    assert len(list(order)) == 3


def test_a_weight_of_an_unknown_category_is_an_error_that_names_it() -> None:
    with pytest.raises(DataError, match=r"'lnog' has a weight, but no prompt is of it.*long"):
        check_weights({"lnog": 1.0}, prompts(1))
    check_weights({"long": 1.0}, prompts(1))
    check_weights(None, prompts(1))
