import pytest
import torch
from torch import Tensor

from server.attention.backend import AttentionBatch
from server.errors import ModelError
from training.methods.unrolled_attention import Unroll, UnrolledAttention, visible_keys

HEADS, KV_HEADS, CHANNELS = 4, 2, 8


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def test_a_draft_sees_the_prefix_of_its_root_and_the_drafts_between() -> None:
    positions = [torch.arange(1, 6), torch.tensor([3, 4, 5]), torch.tensor([4, 5])]
    visible = visible_keys(positions[2], positions)
    # Position 4 of depth 3 has its root at 2, and the draft of depth 2 at 3 between.
    assert visible[0].tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert visible[1].tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 0, 1]


def test_depth_one_is_causal() -> None:
    positions = torch.arange(1, 6)
    assert torch.equal(visible_keys(positions, [positions]), torch.ones(5, 5).tril().bool())


def test_documents_do_not_see_each_other_and_all_depths_get_gradients() -> None:
    places = [
        [torch.arange(1, 5), torch.arange(1, 4)],
        [torch.tensor([3, 4]), torch.tensor([3])],
    ]
    attention = UnrolledAttention()

    def run(documents: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        memory, outputs, keys = Unroll(), [], []
        for depth in places:
            parts = [
                (random(HEADS, len(at), CHANNELS), random(KV_HEADS, len(at), CHANNELS))
                for at in depth
            ]
            chosen = [parts[document] for document in documents]
            memory.begin_depth([depth[document] for document in documents])
            keys += [key for _, key in chosen]
            outputs.append(
                attention.forward(
                    torch.cat([query for query, _ in chosen], 1),
                    torch.cat([key for _, key in chosen], 1),
                    torch.cat([key for _, key in chosen], 1),
                    0,
                    1.0,
                    None,
                    memory,
                )
            )
        return outputs, keys

    both, keys = run([0, 1])
    first, second = run([0])[0], run([1])[0]
    for depth, output in enumerate(both):
        expected = torch.cat((first[depth], second[depth]))
        assert torch.allclose(output, expected, atol=1e-6)
    gradients = torch.autograd.grad(both[1].sum(), keys)
    assert all(bool(gradient.any()) for gradient in gradients)


def test_what_it_cannot_do_is_an_error() -> None:
    attention, x = UnrolledAttention(), torch.zeros(1, 1, 4)
    with pytest.raises(ModelError, match="window of 7"):
        attention.forward(x, x, x, 0, 1.0, 7, Unroll())
    with pytest.raises(ModelError, match="no paged cache"):
        attention.prepare(AttentionBatch((), torch.zeros(0)))
