import pytest
import torch
from torch.nn import functional as F

from heads.packed_product import PackedProduct


def matrix(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (4, 7), (3, 4, 7), (33, 7), (0, 7)])
def test_it_is_the_plain_product(shape: tuple[int, ...]) -> None:
    weight = matrix(50, 7)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(PackedProduct(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_take_the_plain_product_itself(dtype: torch.dtype) -> None:
    weight = matrix(50, 8, dtype)
    x = matrix(4, 8, dtype)
    assert torch.equal(PackedProduct(weight)(x), F.linear(x, weight))


def test_an_input_that_is_not_contiguous_is_fine() -> None:
    weight, x = matrix(50, 8), matrix(8, 4).t()
    with torch.inference_mode():
        torch.testing.assert_close(PackedProduct(weight)(x), F.linear(x, weight))


def test_the_matrix_stays_available() -> None:
    weight = matrix(5, 3)
    assert PackedProduct(weight).weight_OI is weight
