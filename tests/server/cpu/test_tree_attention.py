"""Our own attention to the bit, and in an engine.

`test_backends` compares what it computes with the definition.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.attention.backend import AttentionBatch, AttentionSpan
from server.config import EngineConfig
from server.cpu import own_library
from server.cpu.tree_attention import OwnAttention, TreeAttention, can_attend
from server.engine.build import build_parts
from server.errors import CompilationError
from server.executor.host import HostExecutor
from server.kv.kv_cache import KVCache, KVLayout
from tests.support.log_lines import LogLines
from tests.support.own_code import own_attention
from tests.support.tiny_models import save_tiny_model

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 24, 4
LAYOUT = KVLayout(1, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, torch.float32, torch.device("cpu"))


@pytest.fixture
def library() -> TreeAttention:
    return own_attention()


class Text:
    """Queries, keys and values of a sequence, of which any part can be computed in any step."""

    def __init__(self, num_tokens: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.queries_HTC = torch.randn(NUM_HEADS, num_tokens, HEAD_DIM, generator=generator)
        self.keys_GTC = torch.randn(NUM_KV_HEADS, num_tokens, HEAD_DIM, generator=generator)
        self.values_GTC = torch.randn(NUM_KV_HEADS, num_tokens, HEAD_DIM, generator=generator)


class Steps:
    """Runs steps over one cache; sequences have fixed block tables."""

    def __init__(self, library: TreeAttention, tables: list[list[int]]) -> None:
        self._cache = KVCache(LAYOUT, 1 + max(max(table) for table in tables))
        self._backend = OwnAttention(self._cache, library)
        self._tables = tables

    def run(
        self,
        parts: list[tuple[Text, list[int], int]],
        masks: list[Tensor | None],
        window: int | None = None,
    ) -> list[Tensor]:
        """Outputs of some tokens of some texts, which lie behind a context each."""
        spans, slots, start = [], [], 0
        for table, (_, tokens, first), mask in zip(self._tables, parts, masks, strict=True):
            depths = None if mask is None else mask.sum(1) - 1
            spans.append(AttentionSpan(start, len(tokens), first, table, mask, depths))
            start += len(tokens)
            slots += [
                table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE
                for i in range(first, first + len(tokens))
            ]
        batch = AttentionBatch(tuple(spans), torch.tensor(slots))
        queries, keys, values = (
            torch.cat([getattr(text, name)[:, tokens] for text, tokens, _ in parts], dim=1)
            for name in ("queries_HTC", "keys_GTC", "values_GTC")
        )
        output_THC = self._backend.forward(
            queries, keys, values, 0, 0.2, window, self._backend.prepare(batch)
        )
        return list(torch.split(output_THC, [len(tokens) for _, tokens, _ in parts]))


def one_by_one(library: TreeAttention, text: Text, window: int | None) -> Tensor:
    """A text's outputs as plain decoding computes them."""
    num_tokens = text.queries_HTC.shape[1]
    steps = Steps(library, [list(range(-(-num_tokens // BLOCK_SIZE)))])
    return torch.cat([steps.run([(text, [i], i)], [None], window)[0] for i in range(num_tokens)])


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_chunks_trees_and_neighbours_change_no_bit(
    library: TreeAttention, window: int | None, num_threads: int
) -> None:
    rng = Random(0)
    text, other = Text(40), Text(60, seed=1)
    expected = one_by_one(library, text, window)
    blocks = list(range(40))
    rng.shuffle(blocks)
    steps = Steps(library, [blocks[:15], blocks[15:]])
    torch.set_num_threads(num_threads)
    library.follow_threads()
    try:
        parts = [(text, list(range(23)), 0), (other, list(range(30)), 0)]
        chunk, _ = steps.run(parts, [None, None], window)
        # Nodes 0, 2, 3 and 6 are the text's next tokens, the others are drafts that fail.
        nodes = [23, 39, 24, 25, 38, 37, 26]
        parents = [-1, 0, 0, 2, 2, 3, 3]
        mask = torch.eye(7, dtype=torch.bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                mask[node] |= mask[parent]
        tree, _ = steps.run([(text, nodes, 23), (other, [30, 31], 30)], [mask, None], window)
    finally:
        torch.set_num_threads(1)
        library.follow_threads()

    assert torch.equal(chunk, expected[:23])
    assert torch.equal(tree[[0, 2, 3, 6]], expected[23:27])


def test_a_neighbour_that_is_no_number_spoils_nothing(library: TreeAttention) -> None:
    text, other = Text(10), Text(10, seed=1)
    expected = one_by_one(library, text, None)
    steps = Steps(library, [[0, 1, 2], [3, 4, 5]])
    other.values_GTC[:] = float("nan")
    text.keys_GTC[:, 9] = text.values_GTC[:, 9] = float("inf")
    mask = torch.eye(3, dtype=torch.bool)
    mask[:, 0] = True
    steps.run([(text, list(range(7)), 0), (other, [0], 0)], [None, None])
    # Node 1 is a draft that is no number; node 2 does not see it.
    found, _ = steps.run([(text, [7, 9, 8], 7), (other, [1], 1)], [mask, None])

    assert torch.equal(found[[0, 2]], expected[7:9])
    assert not found[1].isfinite().all()


def test_tensors_may_lie_in_memory_in_any_order(library: TreeAttention) -> None:
    text = Text(9)
    steps = Steps(library, [[0, 1, 2]])
    part = [(text, list(range(9)), 0)]
    (expected,) = steps.run(part, [None])
    text.queries_HTC = text.queries_HTC.transpose(1, 2).contiguous().transpose(1, 2)
    text.keys_GTC = text.keys_GTC.transpose(0, 1).contiguous().transpose(0, 1)
    (found,) = steps.run(part, [None])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("factor", "tolerance"),
    [(30.0, 1e-3), (1.0, 1e-5), (0.05, 1e-5)],
    ids=["sharp", "mixed", "flat"],
)
def test_long_contexts_are_exact_enough(
    library: TreeAttention, factor: float, tolerance: float
) -> None:
    text = Text(3000)
    text.keys_GTC *= factor
    steps = Steps(library, [list(range(750))])
    steps.run([(text, list(range(2990)), 0)], [None])
    (found,) = steps.run([(text, list(range(2990, 3000)), 2990)], [None])
    group = NUM_HEADS // NUM_KV_HEADS
    keys, values = (
        x.repeat_interleave(group, dim=0).double() for x in (text.keys_GTC, text.values_GTC)
    )
    scores = text.queries_HTC[:, 2990:].double() @ keys.transpose(1, 2) * 0.2
    scores.masked_fill_(torch.ones(10, 3000).triu(2991).bool(), float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(0, 1)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "expected"),
    [
        (torch.float32, 64, True),
        (torch.float32, 8, True),
        (torch.float32, 20, False),
        (torch.bfloat16, 64, False),
    ],
)
def test_what_it_can_attend_with(dtype: torch.dtype, head_dim: int, expected: bool) -> None:
    layout = KVLayout(1, 2, head_dim, 16, dtype, torch.device("cpu"))
    assert can_attend(layout) == expected


def test_more_heads_of_a_group_than_lanes(library: TreeAttention) -> None:
    layout = KVLayout(1, 1, 8, 4, torch.float32, torch.device("cpu"))
    backend = OwnAttention(KVCache(layout, 2), library)
    queries_HTC, keys_GTC, values_GTC = (
        torch.randn(20, 5, 8),
        torch.randn(1, 5, 8),
        torch.randn(1, 5, 8),
    )
    batch = AttentionBatch(
        (AttentionSpan(0, 5, 0, [1, 0], None, None),), torch.tensor([4, 5, 6, 7, 0])
    )
    output_THC = backend.forward(
        queries_HTC, keys_GTC, values_GTC, 0, 0.3, None, backend.prepare(batch)
    )
    expected_HTC = F.scaled_dot_product_attention(
        queries_HTC, keys_GTC, values_GTC, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(output_THC, expected_HTC.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_threads_attend_with_their_own_steps(library: TreeAttention) -> None:
    texts = [Text(30, seed) for seed in range(4)]
    expected = [one_by_one(library, text, None) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: one_by_one(library, text, None), texts * 4))
    assert all(torch.equal(found[i], expected[i % 4]) for i in range(16))


def test_what_does_not_belong_together_is_refused(library: TreeAttention) -> None:
    backend = OwnAttention(KVCache(LAYOUT, 4), library)
    with pytest.raises(ValueError, match="blocks, mask or depths do not belong together"):
        backend.prepare(
            AttentionBatch((AttentionSpan(0, 9, 0, [0, 1], None, None),), torch.arange(9))
        )
    wide = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="blocks, mask or depths do not belong together"):
        backend.prepare(AttentionBatch((AttentionSpan(0, 2, 0, [0], wide, None),), torch.arange(2)))
    text = Text(4)
    span = AttentionSpan(0, 3, 0, [0], None, None)
    metadata = backend.prepare(AttentionBatch((span,), torch.arange(3)))
    rows = (text.queries_HTC, text.keys_GTC, text.values_GTC)
    with pytest.raises(ValueError, match="do not belong to a float32 step of 3 tokens"):
        backend.forward(*rows, 0, 0.2, None, metadata)
    queries, keys, values = (x[:, :3].double() for x in rows)
    with pytest.raises(ValueError, match="do not belong to a float32 step of 3 tokens"):
        backend.forward(queries, keys, values, 0, 0.2, None, metadata)


def test_a_cache_that_it_does_not_take_is_refused(library: TreeAttention) -> None:
    layout = KVLayout(1, 2, 20, 4, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="with 20 channels per head, where it needs float32"):
        OwnAttention(KVCache(layout, 1), library)


@pytest.mark.parametrize(
    ("options", "is_own"),
    [
        ({"compile": "auto"}, True),
        ({"compile": "off"}, False),
        ({"compile": "auto", "dtype": "bfloat16"}, False),
    ],
)
def test_an_engine_attends_by_it_where_it_may_compile(
    library: TreeAttention,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    is_own: bool,
) -> None:
    monkeypatch.setattr("server.cpu.accelerate.compile_layers", lambda *args: None)
    config = EngineConfig(
        model=str(save_tiny_model("llama", tmp_path)), device="cpu", num_blocks=16, **options
    )
    parts = build_parts(config)
    assert isinstance(parts.executor, HostExecutor)
    assert isinstance(parts.executor.runner._backend, OwnAttention) == is_own


def test_an_engine_without_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: LogLines
) -> None:
    monkeypatch.setattr("server.cpu.accelerate.compile_layers", lambda *args: None)
    monkeypatch.setattr(own_library, "cpu_features", lambda: "flags : sse")
    config = EngineConfig(
        model=str(save_tiny_model("llama", tmp_path)),
        device="cpu",
        num_blocks=16,
        compile="auto",
        heads="none",
    )
    build_parts(config)
    lines = log.take()
    assert "without our own attention, which is faster: this CPU has no avx512f" in lines


def test_a_model_whose_layers_do_not_compile_with_it_is_compiled_without(
    library: TreeAttention, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: LogLines
) -> None:
    tried: list[bool] = []

    def compile_layers(model: object, echo: object = None) -> None:
        tried.append(echo is not None)
        if echo is not None:
            raise CompilationError("a layer is too strange")

    monkeypatch.setattr("server.cpu.accelerate.compile_layers", compile_layers)
    config = EngineConfig(
        model=str(save_tiny_model("llama", tmp_path)), device="cpu", num_blocks=16, compile="on"
    )
    parts = build_parts(config)
    assert tried == [True, False]
    assert parts.is_compiled
    assert "compiling again for attention by way of Python: a layer is too strange" in log.take()
