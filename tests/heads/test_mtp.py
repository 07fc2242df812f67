import dataclasses

import pytest
import torch
from torch import Tensor, nn

from heads.mtp import MTPConfig, MTPModule

CONFIG = MTPConfig(hidden_size=8, vocab_size=20, draft_vocab_size=5)
IDS = torch.tensor([3, 7, 0, 19, 4])


def embedding(seed: int = 0) -> Tensor:
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))


def module(seed: int = 1) -> MTPModule:
    made = MTPModule(CONFIG, nn.Linear(8, 8), embedding(0), embedding(1), IDS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return made


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + CONFIG.norm_eps).sqrt() * weight


def test_the_state_is_what_the_formula_says() -> None:
    made, states = module(), torch.randn(4, 8)
    tokens = torch.tensor([1, 19, 1, 5])
    found = made(states, tokens, made.block)
    for row, (state, token) in enumerate(zip(states, tokens, strict=True)):
        joined = torch.cat(
            (
                rms(state, made.hidden_norm.weight),
                rms(embedding(1)[token], made.embedding_norm.weight),
            )
        )
        expected = rms(made.block(made.projection.weight @ joined), made.final_norm.weight)
        assert torch.allclose(found[row], expected, atol=1e-5)


def test_draft_logits_are_rows_of_the_base_unembedding() -> None:
    made, states = module(), torch.randn(3, 8)
    assert torch.allclose(made.draft_logits(states), (states @ embedding(0).T)[:, IDS], atol=1e-5)


def test_a_fresh_module_shows_the_block_the_normed_hidden_state() -> None:
    made = MTPModule(CONFIG, nn.Identity(), embedding(0), embedding(1), IDS)
    states = torch.randn(3, 8)
    seen: list[Tensor] = []

    def run(u_TD: Tensor) -> Tensor:
        seen.append(u_TD)
        return u_TD

    made(states, torch.tensor([0, 1, 2]), run)
    assert torch.allclose(seen[0], made.hidden_norm(states))


def test_the_base_matrices_are_no_weights_of_the_module() -> None:
    names = set(module().state_dict())
    assert not any("embedding_VD" in name or "draft_rows" in name for name in names)
    assert "draft_vocab_ids" in names


def test_loading_another_draft_vocabulary_takes_its_rows() -> None:
    made, other = module(), module()
    state = other.state_dict() | {"draft_vocab_ids": torch.tensor([1, 2, 8, 9, 10])}
    made.load_state_dict(state)
    assert torch.equal(made.draft_rows_UD, embedding(0)[[1, 2, 8, 9, 10]])


def test_tokens_of_a_prompt_outside_the_draft_vocabulary_come_with_their_rows() -> None:
    seen = module().seen_rows([3, 5, 7, 5, 11])
    assert seen is not None
    assert seen.token_ids_E.tolist() == [11, 5]
    assert torch.equal(seen.rows_ED, embedding(0)[[11, 5]])
    assert module().seen_rows([3, 19, 3]) is None


def test_a_zero_state_adds_nothing() -> None:
    made, tokens = module(), torch.tensor([4, 2])
    seen: list[Tensor] = []

    def run(u_TD: Tensor) -> Tensor:
        seen.append(u_TD)
        return u_TD

    made(torch.zeros(2, 8), tokens, run)
    embedded_TD = made.embedding_norm(embedding(1)[tokens])
    assert torch.allclose(seen[0], embedded_TD @ made.projection.weight[:, 8:].T, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; give at least 1"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0"),
        ({"draft_vocab_size": 21}, "draft_vocab_size is 21; give at most"),
    ],
)
def test_a_wrong_size_is_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_matrices_and_ids_of_another_shape_are_refused() -> None:
    block = nn.Identity()
    with pytest.raises(ValueError, match="unembedding_VD has shape"):
        MTPModule(CONFIG, block, embedding()[:19], embedding(), IDS)
    with pytest.raises(ValueError, match="input_embedding_VD has shape"):
        MTPModule(CONFIG, block, embedding(), embedding()[:, :7], IDS)
    with pytest.raises(ValueError, match="give 5 ids"):
        MTPModule(CONFIG, block, embedding(), embedding(), IDS[:4])
