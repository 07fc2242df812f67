import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heads.medusa import MedusaConfig, MedusaHeads
from training.data.dataset import NO_LABEL
from training.methods.draft_loss import DraftLoss
from training.methods.medusa_objective import MedusaObjective, medusa_groups
from training.states.examples import Examples

N, D, V, U, K = 13, 8, 40, 12, 3


# Unembedding of the base model.
BASE_VD = torch.randn(V, D, generator=torch.Generator().manual_seed(0))


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
    # Of two answers, each with one token more than it has roots.
    states_MD = torch.randn(N + 2, D, generator=generator).to(dtype)
    rows_N = torch.cat((torch.arange(5), torch.arange(6, N + 1)))
    labels_NK[4, 1:] = NO_LABEL
    labels_NK[3, 2] = NO_LABEL
    return Examples(states_MD, rows_N, torch.randint(V, (N,), generator=generator), labels_NK)


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


def soft_loss_slowly(heads: MedusaHeads, examples: Examples, kl_weight: float) -> Tensor:
    """Each head's sum, one example at a time, by the base's distribution over all tokens."""
    ids = heads.draft_vocab_ids.tolist()
    log_probs_KNU = heads.draft_logits(heads(examples.hidden_ND, examples.roots_N)).log_softmax(2)
    sums_K = [torch.zeros(()) for _ in range(K)]
    for n, row in enumerate(examples.rows_N.tolist()):
        for head, label in enumerate(examples.labels_NK[n].tolist()):
            if label not in ids:
                continue
            ours_U = log_probs_KNU[head, n]
            # The label's own token was drawn from the state so many rows after the root's.
            base_V = (examples.states_MD[row + head + 1] @ BASE_VD.T).softmax(0)
            kept_U = base_V[ids] / base_V[ids].sum()
            divergence = (kept_U * (kept_U.log() - ours_U)).sum()
            hard = -ours_U[ids.index(label)]
            sums_K[head] = sums_K[head] + (1 - kl_weight) * hard + kl_weight * divergence
    return torch.stack(sums_K)


def weighted(objective: MedusaObjective, examples: Examples, decay: float) -> Tensor:
    means_K = objective(examples) / objective.num_labels(examples).clamp(min=1)
    return (decay ** torch.arange(K) * means_K).sum()


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


@pytest.mark.parametrize("draft_vocab_size", [U, None])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
def test_soft_labels_are_the_bases_own_distribution_where_the_label_was_drawn(
    draft_vocab_size: int | None, kl_weight: float
) -> None:
    heads, expected_heads = make_heads(draft_vocab_size), make_heads(draft_vocab_size)
    sums_K = MedusaObjective(heads, torch.float32, kl_weight)(make_examples())
    torch.autograd.backward(sums_K.sum())
    expected_K = soft_loss_slowly(expected_heads, make_examples(), kl_weight)
    torch.autograd.backward(expected_K.sum())
    torch.testing.assert_close(sums_K, expected_K)
    for ours, theirs in zip(heads.parameters(), expected_heads.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_drafts_as_the_base_draws_have_no_divergence_and_no_gradient() -> None:
    states_ND = make_examples().states_MD
    ours_ND = states_ND.clone().requires_grad_()
    loss = DraftLoss(BASE_VD[:U], torch.float32, 1.0)
    labels_N = torch.zeros(len(states_ND), dtype=torch.int64)
    found = loss(ours_ND, labels_N, loss.soft_labels(states_ND))
    torch.autograd.backward(found)
    assert abs(float(found.detach())) < 1e-5
    assert ours_ND.grad is not None
    assert float(ours_ND.grad.abs().max()) < 1e-5


def test_soft_labels_weigh_positions_as_often_as_hard_ones_are_in_the_draft_vocabulary() -> None:
    """Why restricted distributions may be scaled up to 1: on average over labels nothing is lost.

    The expected gradient of hard labels, drawn from the whole vocabulary, is that of soft ones.
    """
    generator = torch.Generator().manual_seed(4)
    state_1D, ours_1D = torch.randn(2, 1, D, generator=generator)
    probs_V = (state_1D @ BASE_VD.T).softmax(1)[0]
    gradients = []
    for kl_weight in (0.0, 1.0):
        loss = DraftLoss(BASE_VD[:U], torch.float32, kl_weight)
        hidden_VD = ours_1D.repeat(V, 1).requires_grad_()
        soft_VU = loss.soft_labels(state_1D).repeat(V, 1)
        labels_V = torch.where(torch.arange(V) < U, torch.arange(V), NO_LABEL)
        torch.autograd.backward(loss(hidden_VD, labels_V, soft_VU))
        assert hidden_VD.grad is not None
        gradients.append(probs_V @ hidden_VD.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_parts_of_a_batch_add_up_to_the_whole(kl_weight: float) -> None:
    objective, examples = MedusaObjective(make_heads(), torch.float32, kl_weight), make_examples()
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
    assert heads.layer_weights.grad is not None
    assert bool((heads.layer_weights.grad[:, 2] == 0).all())


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_bfloat16_products_come_close_and_leave_the_weights_in_float32(kl_weight: float) -> None:
    heads = make_heads()
    exact_K = MedusaObjective(heads, torch.float32, kl_weight)(make_examples())
    rough_K = MedusaObjective(heads, torch.bfloat16, kl_weight)(make_examples(torch.bfloat16))
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
