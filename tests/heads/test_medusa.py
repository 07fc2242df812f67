"""Medusa heads against a per-head, per-sequence computation.

Shape suffixes: B sequences, D model width, K draft heads, R top-k ranks, V vocabulary.
"""

import copy
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads.medusa import MedusaConfig, MedusaHeads
from heads.seen_rows import MAX_SEEN_ROWS

WIDTH, VOCAB_SIZE = 16, 60
DRAFT_VOCAB = torch.tensor([3, 0, 17, 40, 8, 59, 21, 33])


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_heads(restricted: bool = True, trained: bool = True, **options: Any) -> MedusaHeads:
    options = {"num_heads": 3, "draft_vocab_size": len(DRAFT_VOCAB) if restricted else None} | (
        options
    )
    heads = MedusaHeads(
        MedusaConfig(WIDTH, VOCAB_SIZE, **options),
        random_tensor(VOCAB_SIZE, WIDTH, seed=1),
        random_tensor(VOCAB_SIZE, WIDTH, seed=2),
        DRAFT_VOCAB if restricted else None,
    )
    if trained:
        with torch.no_grad():
            for seed, parameter in enumerate(heads.parameters(), start=10):
                parameter.copy_(0.3 * random_tensor(*parameter.shape, seed=seed))
    return heads


def head_hidden_slowly(heads: MedusaHeads, hidden_D: Tensor, root: int, head: int) -> Tensor:
    x_D = hidden_D
    if heads.root_weights is not None:
        x_D = x_D + heads.root_weights[head] @ random_tensor(VOCAB_SIZE, WIDTH, seed=2)[root]
    for layer in range(heads.config.num_layers):
        weight_DD, bias_D = heads.layer_weights[layer, head], heads.layer_biases[layer, head]
        x_D = x_D + F.silu(weight_DD @ x_D + bias_D)
    return x_D


def candidates_slowly(
    heads: MedusaHeads, hidden_D: Tensor, root: int, head: int, draftable: list[int]
) -> list[tuple[int, float]]:
    """Tokens and log-probs, by falling probability."""
    unembedding_VD = random_tensor(VOCAB_SIZE, WIDTH, seed=1)
    logits = unembedding_VD[draftable] @ head_hidden_slowly(heads, hidden_D, root, head)
    pairs = zip(draftable, logits.log_softmax(dim=0).tolist(), strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])


class TestConfig:
    def test_the_defaults_are_four_conditioned_heads_over_the_whole_vocabulary(self) -> None:
        config = MedusaConfig(8, 100)
        assert (config.num_heads, config.num_layers) == (4, 1)
        assert config.root_conditioned
        assert config.draft_vocab_size is None

    @pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_heads", "num_layers"])
    def test_sizes_are_positive(self, name: str) -> None:
        sizes: dict[str, Any] = {"hidden_size": 8, "vocab_size": 100} | {name: 0}
        with pytest.raises(ValueError, match=f"{name} is 0; give at least 1"):
            MedusaConfig(**sizes)

    @pytest.mark.parametrize("size", [0, 101])
    def test_the_draft_vocabulary_is_part_of_the_vocabulary(self, size: int) -> None:
        with pytest.raises(ValueError, match=f"draft_vocab_size is {size}; give 1 to vocab_size"):
            MedusaConfig(8, 100, draft_vocab_size=size)


class TestConstruction:
    @pytest.mark.parametrize("name", ["unembedding_VD", "input_embedding_VD"])
    def test_matrices_fit_the_config(self, name: str) -> None:
        matrices = dict.fromkeys(["unembedding_VD", "input_embedding_VD"], torch.zeros(60, 16))
        matrices[name] = torch.zeros(60, 15)
        with pytest.raises(ValueError, match=rf"{name} has shape \(60, 15\); .* \(60, 16\)"):
            MedusaHeads(MedusaConfig(WIDTH, VOCAB_SIZE), **matrices)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (None, "has shape None; give one id for each of the 3"),
            ([1, 2], r"has shape \(2,\); give one id for each of the 3"),
            ([1, 2, 2], "2 of 3 are distinct"),
            ([1, 2, 60], "span 1 to 60"),
            ([-1, 2, 3], "span -1 to 3"),
        ],
    )
    def test_the_draft_vocabulary_fits_the_config(
        self, ids: list[int] | None, message: str
    ) -> None:
        matrix = torch.zeros(VOCAB_SIZE, WIDTH)
        config = MedusaConfig(WIDTH, VOCAB_SIZE, draft_vocab_size=3)
        with pytest.raises(ValueError, match=message):
            MedusaHeads(config, matrix, matrix, None if ids is None else torch.tensor(ids))

    def test_ids_without_a_draft_vocabulary_are_refused(self) -> None:
        matrix = torch.zeros(VOCAB_SIZE, WIDTH)
        with pytest.raises(ValueError, match="8 draft vocabulary ids, but draft_vocab_size is"):
            MedusaHeads(MedusaConfig(WIDTH, VOCAB_SIZE), matrix, matrix, DRAFT_VOCAB)

    def test_the_base_matrices_are_no_parameters_and_not_in_the_state(self) -> None:
        matrix = nn.Parameter(random_tensor(VOCAB_SIZE, WIDTH))
        config = MedusaConfig(WIDTH, VOCAB_SIZE, num_heads=2, num_layers=3)
        heads = MedusaHeads(config, matrix, matrix)
        shapes = {name: tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
        assert shapes == {
            "layer_weights": (3, 2, WIDTH, WIDTH),
            "layer_biases": (3, 2, WIDTH),
            "root_weights": (2, WIDTH, WIDTH),
        }
        assert set(dict(heads.named_parameters())) == set(shapes)

    def test_the_whole_vocabulary_is_drafted_without_a_copy(self) -> None:
        matrix = random_tensor(VOCAB_SIZE, WIDTH)
        heads = MedusaHeads(MedusaConfig(WIDTH, VOCAB_SIZE), matrix, matrix)
        assert heads.draft_rows_UD.data_ptr() == matrix.data_ptr()

    def test_a_draft_vocabulary_is_part_of_the_state(self) -> None:
        assert make_heads().state_dict()["draft_vocab_ids"].tolist() == DRAFT_VOCAB.tolist()

    def test_heads_without_conditioning_have_no_root_weights(self) -> None:
        assert "root_weights" not in make_heads(root_conditioned=False).state_dict()

    def test_heads_have_the_type_of_the_unembedding(self) -> None:
        matrix = torch.zeros(VOCAB_SIZE, WIDTH, dtype=torch.bfloat16)
        heads = MedusaHeads(MedusaConfig(WIDTH, VOCAB_SIZE), matrix, matrix)
        assert {parameter.dtype for parameter in heads.parameters()} == {torch.bfloat16}


class TestForward:
    @pytest.mark.parametrize("num_layers", [1, 2, 3])
    @pytest.mark.parametrize("root_conditioned", [True, False])
    @pytest.mark.parametrize("num_tokens", [1, 5])
    def test_each_head_is_a_stack_of_residual_layers(
        self, num_layers: int, root_conditioned: bool, num_tokens: int
    ) -> None:
        heads = make_heads(num_layers=num_layers, root_conditioned=root_conditioned)
        hidden_TD, roots_T = random_tensor(num_tokens, WIDTH, seed=5), torch.arange(num_tokens)
        head_hidden_KTD = heads(hidden_TD, roots_T)
        assert head_hidden_KTD.shape == (3, num_tokens, WIDTH)
        for head in range(3):
            for token in range(num_tokens):
                slowly_D = head_hidden_slowly(heads, hidden_TD[token], token, head)
                torch.testing.assert_close(head_hidden_KTD[head, token], slowly_D)

    def test_fresh_heads_pass_the_hidden_state_through(self) -> None:
        hidden_TD = random_tensor(4, WIDTH)
        head_hidden_KTD = make_heads(trained=False)(hidden_TD, torch.arange(4))
        assert torch.equal(head_hidden_KTD, hidden_TD.expand(3, 4, WIDTH))

    def test_heads_do_not_share_their_weights(self) -> None:
        heads = make_heads(trained=False, root_conditioned=False)
        with torch.no_grad():
            heads.layer_weights[0, 1] = torch.eye(WIDTH)
        hidden_TD = random_tensor(2, WIDTH)
        head_hidden_KTD = heads(hidden_TD, torch.arange(2))
        assert torch.equal(head_hidden_KTD[0], hidden_TD)
        assert not torch.equal(head_hidden_KTD[1], hidden_TD)
        assert torch.equal(head_hidden_KTD[2], hidden_TD)

    def test_the_root_token_matters_only_to_conditioned_heads(self) -> None:
        hidden_TD = random_tensor(1, WIDTH)
        for root_conditioned in (True, False):
            heads = make_heads(root_conditioned=root_conditioned)
            outputs = [heads(hidden_TD, torch.tensor([root])) for root in (1, 2)]
            assert torch.equal(*outputs) is not root_conditioned

    def test_every_parameter_learns_from_the_start(self) -> None:
        heads = make_heads(trained=False)
        head_hidden_KTD = heads(random_tensor(4, WIDTH, seed=5), torch.arange(4))
        logits_KTU = heads.draft_logits(head_hidden_KTD)
        assert logits_KTU.shape == (3, 4, len(DRAFT_VOCAB))
        torch.autograd.backward(logits_KTU.log_softmax(dim=2)[:, :, 0].sum())
        for name, parameter in heads.named_parameters():
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().sum()) > 0.0, name

    def test_hidden_states_of_another_type_are_converted(self) -> None:
        heads = make_heads()
        hidden_TD = random_tensor(2, WIDTH).to(torch.bfloat16)
        assert heads(hidden_TD, torch.arange(2)).dtype == torch.float32


class TestSeenRows:
    def test_tokens_outside_the_draft_vocabulary_come_most_recent_first(self) -> None:
        seen = make_heads().seen_rows([1, 3, 2, 1, 0, 5, 1])
        assert seen is not None
        assert seen.token_ids_E.tolist() == [1, 5, 2]
        expected = random_tensor(VOCAB_SIZE, WIDTH, seed=1)[[1, 5, 2]]
        assert torch.equal(seen.rows_ED, expected)

    def test_a_prompt_inside_the_draft_vocabulary_has_none(self) -> None:
        assert make_heads().seen_rows(DRAFT_VOCAB.tolist()) is None
        assert make_heads().seen_rows([]) is None

    def test_the_whole_vocabulary_leaves_none(self) -> None:
        assert make_heads(restricted=False).seen_rows(list(range(VOCAB_SIZE))) is None

    def test_only_the_most_recent_of_many_are_kept(self) -> None:
        matrix = torch.zeros(5000, 2)
        config = MedusaConfig(2, 5000, draft_vocab_size=1)
        seen = MedusaHeads(config, matrix, matrix, torch.tensor([0])).seen_rows(range(5000))
        assert seen is not None
        assert seen.token_ids_E.tolist() == list(range(4999, 4999 - MAX_SEEN_ROWS, -1))


class TestPropose:
    @pytest.mark.parametrize("restricted", [True, False])
    @pytest.mark.parametrize("prompts", [[[]], [[1, 2, 7]], [[1, 2, 7], [], [55]]])
    def test_it_ranks_the_draft_vocabulary_and_what_the_prompt_adds(
        self, restricted: bool, prompts: list[list[int]]
    ) -> None:
        heads = make_heads(restricted)
        hidden_BD = random_tensor(len(prompts), WIDTH, seed=5)
        roots = list(range(len(prompts)))
        seen = [heads.seen_rows(prompt) for prompt in prompts]
        candidates = heads.propose(hidden_BD, torch.tensor(roots), 6, seen)
        for row, prompt in enumerate(prompts):
            own = DRAFT_VOCAB.tolist() if restricted else list(range(VOCAB_SIZE))
            draftable = own + [token for token in prompt if token not in own]
            for head in range(3):
                slowly = candidates_slowly(heads, hidden_BD[row], roots[row], head, draftable)[:6]
                assert candidates.token_ids_BKR[row, head].tolist() == [t for t, _ in slowly]
                assert candidates.log_probs_BKR[row, head].tolist() == pytest.approx(
                    [log_prob for _, log_prob in slowly], abs=1e-4
                )

    def test_a_sequence_does_not_depend_on_its_neighbours(self) -> None:
        heads = make_heads()
        hidden_BD, roots_B = random_tensor(3, WIDTH, seed=5), torch.tensor([1, 2, 3])
        seen = [heads.seen_rows(prompt) for prompt in ([1, 2], [], [50, 51, 52])]
        together = heads.propose(hidden_BD, roots_B, 4, seen)
        for row in range(3):
            one = slice(row, row + 1)
            alone = heads.propose(hidden_BD[one], roots_B[one], 4, seen[one])
            assert torch.equal(alone.token_ids_BKR, together.token_ids_BKR[one])
            torch.testing.assert_close(alone.log_probs_BKR, together.log_probs_BKR[one])

    @pytest.mark.parametrize("prompt", [[], [1, 2]])
    def test_missing_candidates_are_padding_and_never_token_0(self, prompt: list[int]) -> None:
        heads = make_heads()
        num_draftable = len(DRAFT_VOCAB) + len(prompt)
        candidates = heads.propose(
            random_tensor(1, WIDTH), torch.tensor([1]), 12, [heads.seen_rows(prompt)]
        )
        token_ids_KR, log_probs_KR = candidates.token_ids_BKR[0], candidates.log_probs_BKR[0]
        assert token_ids_KR.shape == log_probs_KR.shape == (3, 12)
        for head in range(3):
            drafted = token_ids_KR[head, :num_draftable].tolist()
            assert sorted(drafted) == sorted([*DRAFT_VOCAB.tolist(), *prompt])
        assert (token_ids_KR[:, num_draftable:] == -1).all()
        assert (log_probs_KR[:, num_draftable:] == -math.inf).all()
        torch.testing.assert_close(log_probs_KR.exp().sum(dim=1), torch.ones(3))

    def test_candidates_are_int64_ids_and_float32_log_probs(self) -> None:
        heads = make_heads().to(torch.bfloat16)
        seen = heads.seen_rows([1])
        assert seen is not None
        assert seen.rows_ED.dtype == torch.bfloat16
        hidden_BD = random_tensor(1, WIDTH).to(torch.bfloat16)
        for rows in (seen, None):
            candidates = heads.propose(hidden_BD, torch.tensor([1]), 4, [rows])
            assert candidates.token_ids_BKR.dtype == torch.int64
            assert candidates.log_probs_BKR.dtype == torch.float32

    def test_moving_the_module_moves_what_it_proposes_with(self) -> None:
        heads = make_heads()
        arguments = (random_tensor(1, WIDTH), torch.tensor([1]), 8)
        before = heads.propose(*arguments, [None])
        after = heads.to(torch.float64).propose(*arguments, [None])
        assert torch.equal(before.token_ids_BKR, after.token_ids_BKR)

    def test_training_on_after_a_proposal_changes_the_next_one(self) -> None:
        heads = make_heads()
        arguments = (random_tensor(1, WIDTH), torch.tensor([1]), 8)
        before = heads.propose(*arguments, [None])
        heads(random_tensor(2, WIDTH), torch.tensor([1, 2])).sum().backward()
        torch.optim.SGD(heads.parameters(), lr=1.0).step()
        after = heads.propose(*arguments, [None])
        assert not torch.equal(before.log_probs_BKR, after.log_probs_BKR)

    def test_every_sequence_says_what_it_has_seen(self) -> None:
        with pytest.raises(ValueError, match="seen has 1 entries; give 2"):
            make_heads().propose(random_tensor(2, WIDTH), torch.tensor([1, 2]), 4, [None])

    def test_at_least_one_rank_is_asked_for(self) -> None:
        with pytest.raises(ValueError, match="num_ranks is 0; give at least 1"):
            make_heads().propose(random_tensor(1, WIDTH), torch.tensor([1]), 0, [None])


class TestState:
    def test_a_state_with_another_draft_vocabulary_brings_its_rows(self) -> None:
        heads, other = make_heads(), make_heads()
        state = other.state_dict() | {"draft_vocab_ids": torch.arange(50, 58)}
        heads.propose(random_tensor(1, WIDTH), torch.tensor([1]), 8, [None])
        heads.load_state_dict(state)
        assert torch.equal(heads.draft_rows_UD, random_tensor(VOCAB_SIZE, WIDTH, seed=1)[50:58])
        candidates = heads.propose(random_tensor(1, WIDTH), torch.tensor([1]), 8, [None])
        assert sorted(candidates.token_ids_BKR[0, 0].tolist()) == list(range(50, 58))
        assert heads.seen_rows([50, 3]) is not None

    def test_heads_that_have_proposed_can_be_copied(self) -> None:
        heads = make_heads()
        arguments = (random_tensor(1, WIDTH), torch.tensor([1]), 8, [None])
        before = heads.propose(*arguments)
        again = copy.deepcopy(heads).propose(*arguments)
        assert torch.equal(before.log_probs_BKR, again.log_probs_BKR)


def test_heads_with_matrices_of_their_own_take_no_draft_vocabulary() -> None:
    with pytest.raises(ValueError, match="draft_vocab_size is 3, but heads with vocabulary"):
        MedusaConfig(8, 20, draft_vocab_size=3, own_unembedding=True)


def frozen_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    kept = weight.clone()
    return lambda x: F.linear(x, kept)


@pytest.mark.parametrize(
    ("options", "num_products"),
    [
        ({}, 1 + 3 + 1),
        ({"num_layers": 2}, 1 + 6 + 1),
        ({"root_conditioned": False}, 3 + 1),
        ({"restricted": False}, 1 + 3 + 1),
        ({"restricted": False, "own_unembedding": True}, 1 + 3),
    ],
)
def test_frozen_heads_propose_what_they_propose_otherwise(
    options: dict[str, Any], num_products: int
) -> None:
    heads = make_heads(**options)
    hidden_BD, roots_B = random_tensor(4, WIDTH, seed=3), torch.tensor([5, 8, 0, 59])
    seen = [heads.seen_rows([1, 2, 50]), None, None, heads.seen_rows([17])]
    expected = heads.propose(hidden_BD, roots_B, 4, seen)
    make_product = Mock(side_effect=frozen_product)
    heads.freeze(make_product)
    computed = heads.propose(hidden_BD, roots_B, 4, seen)

    assert make_product.call_count == num_products
    assert torch.equal(computed.token_ids_BKR, expected.token_ids_BKR)
    torch.testing.assert_close(computed.log_probs_BKR, expected.log_probs_BKR)
    # Training goes on with the weights themselves.
    assert heads(hidden_BD, roots_B).requires_grad


def test_heads_that_load_other_weights_are_frozen_no_more() -> None:
    heads, others = make_heads(), make_heads(trained=False)
    heads.freeze(frozen_product)
    heads.load_state_dict(others.state_dict())
    hidden_BD, roots_B = random_tensor(2, WIDTH, seed=3), torch.tensor([5, 8])

    computed = heads.propose(hidden_BD, roots_B, 4, [None, None])
    expected = others.propose(hidden_BD, roots_B, 4, [None, None])
    assert torch.equal(computed.token_ids_BKR, expected.token_ids_BKR)
