import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.data.dataset import NO_LABEL
from training.methods.draft_loss import frozen_cross_entropy

N, D, U = 13, 8, 12


def frozen(hidden_ND: Tensor, rows_UD: Tensor, labels_N: Tensor) -> Tensor:
    return frozen_cross_entropy(hidden_ND, rows_UD, labels_N)


def plain(hidden_ND: Tensor, rows_UD: Tensor, labels_N: Tensor) -> Tensor:
    logits_NU = hidden_ND @ rows_UD.T
    return F.cross_entropy(logits_NU, labels_N, ignore_index=NO_LABEL, reduction="sum")


def test_the_frozen_cross_entropy_and_its_gradient_are_torchs_own() -> None:
    generator = torch.Generator().manual_seed(2)
    rows_UD = torch.randn(U, D, generator=generator)
    labels_N = torch.randint(U, (N,), generator=generator)
    labels_N[3] = NO_LABEL
    results = []
    for compute in (frozen, plain):
        hidden_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(3)).requires_grad_()
        loss = compute(hidden_ND, rows_UD, labels_N)
        torch.autograd.backward(loss * 1.7)
        results.append((loss.detach(), hidden_ND.grad))
    torch.testing.assert_close(results[0], results[1])
    gradient_ND = results[0][1]
    assert gradient_ND is not None
    assert bool((gradient_ND[3] == 0).all())


def test_without_a_gradient_only_the_loss_is_computed() -> None:
    loss = frozen_cross_entropy(torch.zeros(2, D), torch.ones(U, D), torch.tensor([0, 1]))
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(2 * math.log(U))
