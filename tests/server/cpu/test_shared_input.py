"""Siblings against the layers that they stand for."""

import torch
from torch import Tensor, nn

from server.cpu.shared_input import SharedInput, Sibling


class CountingLinear(nn.Linear):
    """Counts its calls."""

    num_calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.num_calls += 1
        return super().forward(input)


def make_siblings(*sizes: int) -> tuple[CountingLinear, list[Sibling]]:
    layer = CountingLinear(6, sum(sizes)).requires_grad_(False)
    shared = SharedInput(layer, sizes)
    return layer, [Sibling(shared, index) for index in range(len(sizes))]


def test_one_product_serves_all_siblings() -> None:
    layer, (first, second, third) = make_siblings(4, 2, 3)
    rows = torch.randn(1, 5, 6)
    whole = layer(rows)
    layer.num_calls = 0

    assert torch.equal(first(rows), whole[..., :4])
    assert torch.equal(second(rows), whole[..., 4:6])
    assert torch.equal(third(rows), whole[..., 6:])
    assert layer.num_calls == 1


def test_the_order_of_calls_is_free() -> None:
    layer, (first, second) = make_siblings(4, 2)
    rows = torch.randn(3, 6)
    whole = layer(rows)

    assert torch.equal(second(rows), whole[:, 4:])
    assert torch.equal(first(rows), whole[:, :4])


def test_another_input_is_computed_again() -> None:
    layer, (first, second) = make_siblings(4, 2)
    rows, others = torch.randn(3, 6), torch.randn(3, 6)
    first(rows)

    assert torch.equal(second(others), layer(others)[:, 4:])
    assert torch.equal(first(rows), layer(rows)[:, :4])


def test_the_same_tensor_is_computed_again_in_the_next_step() -> None:
    layer, siblings = make_siblings(4, 2)
    rows = torch.randn(3, 6)
    for sibling in siblings:
        sibling(rows)
    rows.mul_(2.0)

    assert torch.equal(siblings[0](rows), layer(rows)[:, :4])


def test_a_sibling_that_is_asked_twice_computes_twice() -> None:
    layer, (first, _) = make_siblings(4, 2)
    rows = torch.randn(3, 6)
    before = first(rows)

    assert torch.equal(first(rows), before)
    assert layer.num_calls == 2


def test_nothing_is_kept_when_all_are_served() -> None:
    layer = nn.Linear(6, 6).requires_grad_(False)
    shared = SharedInput(layer, [4, 2])
    rows = torch.randn(3, 6)
    for index in range(2):
        shared.take(index, rows)

    assert (shared._input, shared._outputs) == (None, {})


def test_a_sibling_names_its_layer() -> None:
    shared = SharedInput(nn.Linear(6, 5, bias=False), [3, 2])

    assert repr(Sibling(shared, 1)) == (
        "Sibling(1 of Linear(in_features=6, out_features=5, bias=False))"
    )
