"""The loss of an MTP module: that of its drafts at every depth of an unrolled pass.

Shape suffixes: T flat tokens of one depth, N labelled ones, M tokens of all documents that any
depth learns at, D model width, K depths,
U draft vocabulary, V vocabulary.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from heads.mtp import MTPModule
from server.model.decoder_layer import DecoderLayer
from training.data.dataset import draft_vocab_index
from training.methods.draft_loss import DraftLoss
from training.methods.mtp_unroll import DepthOutput, draft_positions, unroll
from training.states.encoded import EncodedBatch


class MTPObjective:
    """Computes the losses of a module in a given compute dtype.

    Args:
        module: Module whose draft vocabulary does not change any more; labels outside of it count
            for nothing.
        layer: Runs the module's layer.
        num_depths: Depths to unroll.
        compute_dtype: Type of the matrix products; the weights keep theirs.
        kl_weight: Share of the divergence in the loss, see `DraftLoss`.
    """

    def __init__(
        self,
        module: MTPModule,
        layer: DecoderLayer,
        num_depths: int,
        compute_dtype: torch.dtype,
        kl_weight: float = 0.0,
    ) -> None:
        self._module = module
        self._layer = layer
        self._num_depths = num_depths
        self._dtype = compute_dtype
        self._loss = DraftLoss(module.draft_rows_UD, compute_dtype, kl_weight)
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
        """Sum each depth's loss, K, on the module's device."""
        is_mixed = self._dtype != torch.float32
        losses = []
        soft = _SoftLabels(batch, self._loss, self._index_V.device) if self._loss.is_soft else None
        with torch.autocast(self._index_V.device.type, self._dtype, enabled=is_mixed):
            for output in unroll(self._module, self._layer, batch.documents, self._num_depths):
                labels_T = self._index_V[output.labels_T.clamp(min=-1)]
                # The unembedding costs as much as the layer, so it is left out where it can be.
                at_N = (labels_T >= 0).nonzero()[:, 0]
                soft_NU = None if soft is None else soft.of(output, at_N)
                losses.append(self._loss(output.states_TD[at_N], labels_T[at_N], soft_NU))
        return F.pad(torch.stack(losses), (0, self._num_depths - len(losses)))


class _SoftLabels:
    """What the base model says at every position that the first depth learns at.

    Deeper ones learn at some of these, so that it is computed once for all depths.
    """

    def __init__(self, batch: EncodedBatch, loss: DraftLoss, device: torch.device) -> None:
        lengths = [len(item.document.token_ids_T) for item in batch.documents]
        self._starts = list(itertools.accumulate(lengths[:-1], initial=0))
        learnt = [draft_positions(item.document, 1).to(device) for item in batch.documents]
        self._places_M = self._flat(learnt)
        # The token after position i is drawn from the hidden state of position i.
        states = [item.hidden_XD[at] for item, at in zip(batch.documents, learnt, strict=True)]
        self._log_probs_MU = loss.soft_labels(torch.cat(states))

    def of(self, output: DepthOutput, at_N: Tensor) -> Tensor:
        """Log-probs NU at some rows of a depth's output."""
        places_N = self._flat(output.positions)[at_N]
        return self._log_probs_MU[torch.searchsorted(self._places_M, places_N)]

    def _flat(self, positions: Sequence[Tensor]) -> Tensor:
        """Positions in documents as positions in all of them together."""
        pairs = zip(positions, self._starts, strict=True)
        return torch.cat([position + start for position, start in pairs])
