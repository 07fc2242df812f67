"""Growing a draft tree of an MTP module the slow way: no cache, no batch, one path at a time.

The base model's hidden states come from plain transformers over the whole text, and each node's
state from a dense causal pass of the module over the text and the node's own path.
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from heads.mtp import MTPConfig, MTPModule
from server.attention.backend import AttentionBackend, AttentionBatch
from server.attention.hook import AttentionContext
from server.model.decoder_layer import DecoderLayer
from server.model.loading import LoadedModel
from server.speculation.sources.mtp_drafter import Growth
from tests.support.engine_tools import tiny_loaded, tiny_reference
from tests.support.tiny_models import TinyKind

NUM_DRAFTED = 60


def tiny_mtp(
    loaded: LoadedModel, draft_ids: Seq[int] | None = None
) -> tuple[MTPModule, DecoderLayer]:
    """A module with random weights over a part of the vocabulary; always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        block = DecoderLayer(loaded.model)
        ids = torch.randperm(loaded.vocab_size)[:NUM_DRAFTED]
        if draft_ids is not None:
            ids = torch.tensor(draft_ids)
        config = MTPConfig(loaded.hidden_size, loaded.vocab_size, len(ids))
        matrices = (loaded.unembedding(), loaded.input_embedding())
        module = MTPModule(config, block.module, *matrices, ids)
        with torch.no_grad():
            module.projection.weight.normal_(std=0.3)
    return module.eval().requires_grad_(False), block


class DenseAttention(AttentionBackend):
    """Plain causal attention over all tokens of one pass; for one sequence."""

    def prepare(self, batch: AttentionBatch) -> None:
        raise AssertionError("a dense pass has no batch")

    def forward(
        self,
        queries_HTC: Tensor,
        keys_HTC: Tensor,
        values_HTC: Tensor,
        layer: int,
        scaling: float,
        sliding_window: int | None,
        metadata: None,
    ) -> Tensor:
        num_tokens = queries_HTC.shape[1]
        output = torch.zeros_like(queries_HTC)
        group = len(queries_HTC) // len(keys_HTC)
        for head, queries_TC in enumerate(queries_HTC):
            for token in range(num_tokens):
                first = 0 if sliding_window is None else max(0, token + 1 - sliding_window)
                keys = keys_HTC[head // group, first : token + 1]
                weights = (keys @ queries_TC[token] * scaling).softmax(0)
                output[head, token] = weights @ values_HTC[head // group, first : token + 1]
        return output.transpose(0, 1).contiguous()


@dataclass
class SlowDrafter:
    """Grows one tree at a time."""

    kind: TinyKind
    growth: Growth

    def __post_init__(self) -> None:
        self.module, self.block = tiny_mtp(tiny_loaded(self.kind))

    @torch.inference_mode()
    def tree(self, token_ids: Seq[int], num_prompt_tokens: int) -> list[tuple[int, ...]]:
        """The tokens along each node's path, nodes by falling path probability."""
        model = tiny_reference(self.kind).base_model
        hidden_TD = model(torch.tensor([token_ids]), use_cache=False).last_hidden_state[0]
        before_TD = torch.cat((torch.zeros_like(hidden_TD[:1]), hidden_TD[:-1]))
        tokens = list(self.module.draft_vocab_ids.tolist())
        # As the server reads a prompt: its most recent tokens first.
        tokens += [
            token
            for token in dict.fromkeys(reversed(token_ids[:num_prompt_tokens]))
            if token not in tokens
        ]
        found: list[tuple[float, tuple[int, ...]]] = []
        frontier: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for _ in range(self.growth.num_depths):
            level = []
            for log_prob, path in frontier:
                state = self._state(token_ids, before_TD, path)
                rows = tiny_loaded(self.kind).unembedding()[tokens]
                ranked = (rows @ state).log_softmax(0).topk(self.growth.num_ranks)
                for value, index in zip(ranked.values, ranked.indices, strict=True):
                    level.append((log_prob + float(value), (*path, tokens[int(index)])))
            found += level
            frontier = sorted(level, reverse=True)[: self.growth.width]
        found.sort(key=lambda item: -item[0])
        assert all(log_prob > -math.inf for log_prob, _ in found)
        return [path for _, path in found[: self.growth.num_nodes - 1]]

    def _state(self, token_ids: Seq[int], before_TD: Tensor, path: tuple[int, ...]) -> Tensor:
        """The module's state at the last token of a path below the root."""
        tokens = list(token_ids)
        states = before_TD
        for token in (*path, None):
            positions_T = torch.arange(len(tokens))
            context = AttentionContext(DenseAttention(), None)
            run = self.block.runner(positions_T, context)
            output_TD: Tensor = self.module(states, torch.tensor(tokens), run)
            if token is not None:
                tokens.append(token)
                states = torch.cat((states, output_TD[-1:]))
        return output_TD[-1]


def token_paths(tree_parents: Seq[int], token_ids: Seq[int]) -> list[tuple[int, ...]]:
    """The tokens along each node's path, root excluded."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(tree_parents)):
        paths.append((*paths[tree_parents[node]], token_ids[node]))
    return paths[1:]
