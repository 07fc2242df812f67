import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heads.medusa import MedusaConfig, MedusaHeads
from training.examples import NO_LABEL, Examples
from training.losses import MedusaObjective, frozen_cross_entropy, medusa_groups

N, D, V, U, K = 13, 8, 40, 12, 3


def make_heads(draft_vocab_size: int | None = U) -> MedusaHeads:
    generator = torch.Generator().manual_seed(0)
    matrix_VD = torch.randn(V, D, generator=generator)
    ids_U = None
    if draft_vocab_size is not None:
        ids_U = torch.randperm(V, generator=generator)[:draft_vocab_size]
    config = MedusaConfig(D, V, num_heads=K, draft_vocab_size=draft_vocab_size)
    heads = MedusaHeads(config, matrix_VD, matrix_VD, ids_U)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return heads


def make_examples(dtype: torch.dtype = torch.float32) -> Examples:
    generator = torch.Generator().manual_seed(1)
    labels_NK = torch.randint(V, (N, K), generator=generator)
    labels_NK[-1, 1:] = NO_LABEL
    labels_NK[-2, 2] = NO_LABEL
    hidden_ND = torch.randn(N, D, generator=generator).to(dtype)
    return Examples(hidden_ND, torch.randint(V, (N,), generator=generator), labels_NK)


def loss_slowly(heads: MedusaHeads, examples: Examples, decay: float) -> Tensor:
    """One example, one head at a time, by torch's own cross-entropy."""
    index = {token: i for i, token in enumerate(heads.draft_vocab_ids.tolist())}
    logits_KNU = heads.draft_logits(heads(examples.hidden_ND, examples.roots_N))
    total = torch.zeros(())
    for head in range(K):
        terms = [
            F.cross_entropy(logits_KNU[head, n], torch.tensor(index[label]))
            for n, label in enumerate(examples.labels_NK[:, head].tolist())
            if label in index
        ]
        total = total + decay**head * torch.stack(terms).mean()
    return total


def weighted(objective: MedusaObjective, examples: Examples, decay: float) -> Tensor:
    means_K = objective(examples) / objective.num_labels(examples).clamp(min=1)
    return (decay ** torch.arange(K) * means_K).sum()


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


@pytest.mark.parametrize("draft_vocab_size", [U, None])
@pytest.mark.parametrize("decay", [0.8, 1.0, 0.0])
def test_the_loss_and_its_gradients_are_those_of_a_slow_loop(
    draft_vocab_size: int | None, decay: float
) -> None:
    heads, expected_heads = make_heads(draft_vocab_size), make_heads(draft_vocab_size)
    loss = weighted(MedusaObjective(heads, torch.float32), make_examples(), decay)
    torch.autograd.backward(loss)
    expected = loss_slowly(expected_heads, make_examples(), decay)
    torch.autograd.backward(expected)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(heads.parameters(), expected_heads.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    objective, examples = MedusaObjective(make_heads(), torch.float32), make_examples()
    parts = [examples.take(torch.arange(4)), examples.take(torch.arange(4, N))]
    sums_K = objective(parts[0]) + objective(parts[1])
    torch.testing.assert_close(sums_K, objective(examples))
    num_labels_K = objective.num_labels(parts[0]) + objective.num_labels(parts[1])
    assert torch.equal(num_labels_K, objective.num_labels(examples))


def test_a_batch_without_labels_for_a_head_costs_that_head_nothing() -> None:
    examples = make_examples()
    examples.labels_NK[:, 2] = NO_LABEL
    heads = make_heads()
    objective = MedusaObjective(heads, torch.float32)
    sums_K = objective(examples)
    torch.autograd.backward(sums_K.sum())
    assert sums_K[2] == 0.0
    assert objective.num_labels(examples)[2] == 0
    assert heads.block_weights.grad is not None
    assert bool((heads.block_weights.grad[:, 2] == 0).all())


def test_bfloat16_products_come_close_and_leave_the_weights_in_float32() -> None:
    heads = make_heads()
    exact_K = MedusaObjective(heads, torch.float32)(make_examples())
    rough_K = MedusaObjective(heads, torch.bfloat16)(make_examples(torch.bfloat16))
    torch.testing.assert_close(rough_K, exact_K, rtol=0.03, atol=0.0)
    torch.autograd.backward(rough_K.sum())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in heads.parameters())


@pytest.mark.parametrize("root_conditioned", [True, False])
def test_every_parameter_is_in_one_group(root_conditioned: bool) -> None:
    matrix_VD = torch.zeros(V, D)
    config = MedusaConfig(D, V, num_heads=K, root_conditioned=root_conditioned)
    heads = MedusaHeads(config, matrix_VD, matrix_VD)
    groups = medusa_groups(heads, 7.0)
    found = [id(parameter) for group in groups for parameter in group.parameters]
    assert sorted(found) == sorted(map(id, heads.parameters()))
    assert [group.rate_factor for group in groups] == ([1.0, 7.0] if root_conditioned else [1.0])
