"""Runs the base model on a step's batch over the paged KV cache.

Shapes: T flat tokens, S rows of logits, D model width, V vocabulary.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.attention.backend import AttentionBackend
from server.attention.hook import AttentionContext, install_attention
from server.executor.batch import StepBatch
from server.kv.kv_cache import KVCache
from server.model.loading import LoadedModel


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What the base model says about the rows that were asked for.

    Attributes:
        logits_SV: In the model's dtype.
        hidden_SD: What the unembedding saw: the last hidden states after the final norm.
    """

    logits_SV: Tensor
    hidden_SD: Tensor


class ModelRunner:
    """The base model with our attention; one call is one forward pass.

    Args:
        loaded: The model.
        kv_cache: Its keys and values.
        attention: Attends over that cache.
    """

    def __init__(self, loaded: LoadedModel, kv_cache: KVCache, attention: AttentionBackend) -> None:
        self._model = loaded.model
        self._kv_cache = kv_cache
        self._backend = attention
        self._hidden: Tensor | None = None
        self._all_hidden: Tensor | None = None
        install_attention(loaded.model)
        unembedding = loaded.model.get_output_embeddings()
        # The unembedding's input is the hidden state of just the rows asked for, whatever the
        # model does to its logits afterwards.
        unembedding.register_forward_pre_hook(self._capture_hidden)
        if kv_cache.layout.hidden_size:
            loaded.model.base_model.register_forward_hook(self._capture_all_hidden)

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> TargetOutput:
        """Compute the batch's KV and the logits and hidden states of its `logits_rows_S`.

        A cache with room for hidden states gets those of all tokens.
        """
        context = AttentionContext(self._backend, self._backend.prepare(batch.attention))
        output = self._model(
            input_ids=batch.input_ids_T.unsqueeze(0),
            position_ids=batch.positions_T.unsqueeze(0),
            use_cache=False,
            logits_to_keep=batch.logits_rows_S,
            attention_context=context,
        )
        hidden_1SD, self._hidden = self._hidden, None
        if hidden_1SD is None:
            raise AssertionError("the model did not call its unembedding")
        if self._all_hidden is not None:
            self._kv_cache.write_hidden(batch.attention.slots_T, self._all_hidden[0])
            self._all_hidden = None
        return TargetOutput(output.logits[0], hidden_1SD[0])

    def hidden_states(self, block_table: Seq[int], count: int) -> Tensor:
        """Copy the hidden states of a sequence's first tokens, `[count, D]`.

        Only if the cache has room for hidden states, and these tokens are computed.
        """
        layout = self._kv_cache.layout
        blocks = torch.tensor(block_table, dtype=torch.int64, device=layout.device)
        offsets = torch.arange(layout.block_size, device=layout.device)
        slots = (blocks.unsqueeze(1) * layout.block_size + offsets).flatten()[:count]
        return self._kv_cache.hidden_SD[slots]

    def compact(self, source_slots: list[int], target_slots: list[int]) -> None:
        """Move accepted tree nodes' KV to the slots of their positions."""
        self._kv_cache.compact(source_slots, target_slots)

    def _capture_hidden(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._hidden = args[0]

    def _capture_all_hidden(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._all_hidden = output.last_hidden_state
