import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.methods.divergence import frozen_divergence

D, V = 6, 30


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slowly(hidden_ND: Tensor, teacher_ND: Tensor, rows_VD: Tensor) -> Tensor:
    ours_NV = (hidden_ND @ rows_VD.T).log_softmax(dim=1)
    theirs_NV = (teacher_ND @ rows_VD.T).log_softmax(dim=1)
    return (theirs_NV.exp() * (theirs_NV - ours_NV)).sum()


# More rows than one chunk has, and fewer.
@pytest.mark.parametrize("num_rows", [1, 13, 600])
def test_it_and_its_gradient_are_those_of_the_definition(num_rows: int) -> None:
    rows_VD, teacher_ND = draw(V, D, seed=0), draw(num_rows, D, seed=1)
    results = []
    for compute in (frozen_divergence, slowly):
        hidden_ND = draw(num_rows, D, seed=2).requires_grad_()
        total = compute(hidden_ND, teacher_ND, rows_VD)
        torch.autograd.backward(total * 0.3)
        results.append((total.detach(), hidden_ND.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_of_a_model_from_itself_it_is_zero_and_pulls_nowhere() -> None:
    hidden_ND = draw(9, D, seed=3).requires_grad_()
    total = frozen_divergence(hidden_ND, hidden_ND.detach(), draw(V, D, seed=0))
    torch.autograd.backward(total)
    assert float(total.detach()) == pytest.approx(0.0, abs=1e-6)
    assert hidden_ND.grad is not None
    assert float(hidden_ND.grad.abs().max()) < 1e-5


def test_it_is_taken_in_float32_for_16_bit_states() -> None:
    states = [draw(9, D, seed=seed).to(torch.bfloat16) for seed in (4, 5)]
    rows_VD = draw(V, D, seed=0).to(torch.bfloat16)
    total = frozen_divergence(states[0].requires_grad_(), states[1], rows_VD)
    logits = [F.linear(state, rows_VD).float().log_softmax(dim=1) for state in states]
    expected = F.kl_div(logits[0], logits[1], reduction="sum", log_target=True)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected)
