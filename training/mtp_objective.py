"""The loss of an MTP module: cross-entropy of its drafts at every depth of an unrolled pass.

Shape suffixes: T flat tokens of one depth, N labelled ones, D model width, K depths, U draft
vocabulary, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from heads.mtp import MTPModule
from server.model.decoder_block import DecoderBlock
from training.losses import draft_vocab_index, frozen_cross_entropy
from training.mtp_source import EncodedBatch
from training.mtp_unroll import draft_positions, unroll


class MTPObjective:
    """Computes the losses of a module in a given compute dtype.

    Args:
        module: Its draft vocabulary must not change any more; labels outside of it count for
            nothing.
        block: Runs the module's block.
        num_depths: Depths to unroll.
        compute_dtype: Of the matrix products; the weights keep theirs.
    """

    def __init__(
        self,
        module: MTPModule,
        block: DecoderBlock,
        num_depths: int,
        compute_dtype: torch.dtype,
    ) -> None:
        self._module = module
        self._block = block
        self._num_depths = num_depths
        self._dtype = compute_dtype
        self._rows_UD = module.draft_rows_UD.to(compute_dtype)
        self._index_V = draft_vocab_index(module.draft_vocab_ids, module.config.vocab_size)

    def num_labels(self, batch: EncodedBatch) -> Tensor:
        """Count each depth's labels in the draft vocabulary, int64 K."""
        counts = []
        for depth in range(1, self._num_depths + 1):
            labels = [
                item.document.token_ids_T[draft_positions(item.document, depth) + 1]
                for item in batch.documents
            ]
            labels_N = torch.cat(labels).to(self._index_V.device)
            counts.append((self._index_V[labels_N] >= 0).sum())
        return torch.stack(counts)

    def __call__(self, batch: EncodedBatch) -> Tensor:
        """Sum each depth's cross-entropy, K, on the module's device."""
        is_mixed = self._dtype != torch.float32
        losses = []
        with torch.autocast(self._index_V.device.type, self._dtype, enabled=is_mixed):
            for output in unroll(self._module, self._block, batch.documents, self._num_depths):
                labels_T = self._index_V[output.labels_T.clamp(min=-1)]
                # The unembedding costs as much as the block, so it is left out where it can be.
                at_N = (labels_T >= 0).nonzero()[:, 0]
                states_ND = output.states_TD[at_N].to(self._dtype)
                losses.append(frozen_cross_entropy(states_ND, self._rows_UD, labels_T[at_N]))
        return F.pad(torch.stack(losses), (0, self._num_depths - len(losses)))
