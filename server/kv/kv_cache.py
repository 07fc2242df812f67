"""The tensors of the paged KV cache.

One tensor `[layers, 2, blocks, block_size, kv_heads, C]`, allocated once. A *slot* is a token's
place, `block_id * block_size + offset`. A draft module that attends has a layer of its own behind
the base model's, and needs the base model's last hidden state of every token, so these are kept
here too. Knows nothing of who owns a block.

Shapes: T flat tokens, H attention heads, C channels per head, D model width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Sizes of a KV cache that do not depend on its length.

    Attributes:
        num_layers: Layers that attend, that of a draft module included.
        hidden_size: Width of the hidden states that are kept; 0 keeps none.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    hidden_size: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers: keys, values and hidden states."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim + self.hidden_size
        return per_token * self.block_size * self.dtype.itemsize

    def slot(self, block_table: Sequence[int], position: int) -> int:
        """The slot of a token at a position of a sequence with these blocks."""
        size = self.block_size
        return block_table[position // size] * size + position % size

    def slots(self, block_table: Sequence[int], first: int, end: int) -> list[int]:
        """The slots of the tokens from one position to before another."""
        size = self.block_size
        return [block_table[i // size] * size + i % size for i in range(first, end)]


class KVCache:
    """Keys and values of every slot, written by the attention, moved by `compact`.

    Attributes:
        keys: Per layer a view `[slots, kv_heads, C]`.
        values: Per layer a view of the same shape.
        hidden_SD: Last hidden state of every slot's token; without columns if none are kept.
    """

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self._data = _zeros(
            (
                layout.num_layers,
                2,
                num_blocks,
                layout.block_size,
                layout.num_kv_heads,
                layout.head_dim,
            ),
            layout,
        )
        self._slots = self._data.flatten(2, 3)
        self.keys = [self._slots[i, 0] for i in range(layout.num_layers)]
        self.values = [self._slots[i, 1] for i in range(layout.num_layers)]
        self.hidden_SD = _zeros((num_blocks * layout.block_size, layout.hidden_size), layout)

    def write(self, layer: int, slots_T: Tensor, keys_THC: Tensor, values_THC: Tensor) -> None:
        """Store the keys and values of T tokens of one layer."""
        self.keys[layer].index_copy_(0, slots_T, keys_THC)
        self.values[layer].index_copy_(0, slots_T, values_THC)

    def write_hidden(self, slots_T: Tensor, hidden_TD: Tensor) -> None:
        """Store the base model's last hidden states of T tokens."""
        self.hidden_SD.index_copy_(0, slots_T, hidden_TD)

    def compact(self, source_slots: list[int], target_slots: list[int]) -> None:
        """Move accepted tree nodes to the slots of their positions: all layers, hidden states.

        The sources are read before any target is written, so the two may overlap.
        """
        if not source_slots:
            return
        device = self.layout.device
        source = torch.tensor(source_slots, device=device)
        target = torch.tensor(target_slots, device=device)
        self._slots[:, :, target] = self._slots[:, :, source]
        self.hidden_SD[target] = self.hidden_SD[source]


def _zeros(shape: tuple[int, ...], layout: KVLayout) -> Tensor:
    """Zeros, so that memory which nobody wrote can never hold a NaN."""
    if layout.device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=layout.dtype, device=layout.device)
    # NumPy leaves zeroing to the operating system, which hands out pages on their first write; a
    # cache of gigabytes takes neither time nor memory before it is used.
    num_bytes = math.prod(shape) * layout.dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(layout.dtype).view(shape)
