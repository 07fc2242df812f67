"""Medusa heads: every head drafts one further token from the same last hidden state.

Head k (from 0) drafts the token at depth k + 1, the one after the root token. Its input is the
base model's last hidden state, optionally plus a linear map, its own, of the root token's
embedding; then come residual layers x + SiLU(W x), and the base model's frozen unembedding. The
unembedding can be restricted to a draft vocabulary, to which the tokens of a request's own prompt
are added.

Owns the heads' weights. The base model's matrices are used by reference: they are no parameters,
are in no state dict, and stay on their device when the module moves.

Shape suffixes: B sequences, T flat tokens, D model width, K draft heads, R top-k ranks,
V vocabulary, U draft vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads.candidates import Candidates
from heads.packed_product import PackedProduct
from heads.seen_rows import SeenRows, gather_seen_rows, top_candidates

# Makes a product with the transpose of a matrix [outputs, inputs] that no longer changes.
MakeProduct = Callable[[Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True, slots=True)
class MedusaConfig:
    """Shape of a set of Medusa heads.

    Attributes:
        hidden_size: Width of the base model.
        vocab_size: Rows of the base model's unembedding.
        num_heads: Draft heads, hence the largest depth.
        num_layers: Residual layers of each head.
        root_conditioned: Whether the heads see the root token's embedding.
        draft_vocab_size: Tokens that the heads can draft; None for the whole vocabulary.
        own_unembedding: Whether each head has a vocabulary matrix of its own, as the original
            Medusa does, instead of the base model's.

    Raises:
        ValueError: If a size is less than 1, the draft vocabulary exceeds the vocabulary, or heads
            with matrices of their own are restricted to one.
    """

    hidden_size: int
    vocab_size: int
    num_heads: int = 4
    num_layers: int = 1
    root_conditioned: bool = True
    draft_vocab_size: int | None = None
    own_unembedding: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size}; give 1 to vocab_size "
                f"({self.vocab_size}), or None for the whole vocabulary"
            )
        if self.own_unembedding and self.draft_vocab_size is not None:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size}, but heads with vocabulary matrices "
                "of their own draft from the whole vocabulary; give None"
            )


class MedusaHeads(nn.Module):
    """K draft heads over one hidden state.

    Built in the unembedding's dtype and on its device. Fresh heads pass the hidden state through
    unchanged: all their weights are zero.

    Args:
        unembedding_VD: The base model's unembedding.
        input_embedding_VD: The base model's input embedding.
        draft_vocab_ids: Distinct ids of the draft vocabulary; None exactly if the config's
            `draft_vocab_size` is None.

    Attributes:
        draft_vocab_ids: Int64 [U]; in the state dict unless the whole vocabulary is drafted.

    Raises:
        ValueError: If a matrix or the draft vocabulary does not fit the config.
    """

    draft_vocab_ids: Tensor
    draft_rows_UD: Tensor

    def __init__(
        self,
        config: MedusaConfig,
        unembedding_VD: Tensor,
        input_embedding_VD: Tensor,
        draft_vocab_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        _check_matrix("unembedding_VD", unembedding_VD, config)
        _check_matrix("input_embedding_VD", input_embedding_VD, config)
        self.config = config
        # Detached, because a parameter would register itself with this module.
        self._unembedding_VD = unembedding_VD.detach()
        self._input_embedding_VD = input_embedding_VD.detach()
        width, like = config.hidden_size, self._unembedding_VD
        layers = (config.num_layers, config.num_heads, width)
        self.layer_weights = nn.Parameter(like.new_zeros(*layers, width))
        self.layer_biases = nn.Parameter(like.new_zeros(layers))
        self.root_weights: nn.Parameter | None = None
        if config.root_conditioned:
            self.root_weights = nn.Parameter(like.new_zeros(config.num_heads, width, width))
        self.unembedding_KVD: nn.Parameter | None = None
        if config.own_unembedding:
            matrices = (config.num_heads, config.vocab_size, width)
            self.unembedding_KVD = nn.Parameter(like.new_zeros(matrices))
        ids_U = _checked_draft_vocab(draft_vocab_ids, config).to(like.device)
        is_restricted = config.draft_vocab_size is not None
        self.register_buffer("draft_vocab_ids", ids_U, persistent=is_restricted)
        self._gather_draft_rows()
        # A state dict may bring other draft vocabulary ids.
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda heads, _: heads._gather_draft_rows()
        )

    def _gather_draft_rows(self) -> None:
        rows_UD = self._unembedding_VD.to(self.layer_weights.dtype)
        if self.config.draft_vocab_size is not None:
            rows_UD = rows_UD.index_select(0, self.draft_vocab_ids)
        self.register_buffer("draft_rows_UD", rows_UD, persistent=False)
        self._draft_vocab = frozenset(self.draft_vocab_ids.tolist())
        self._unembed: PackedProduct | None = None
        self._frozen: _FrozenProducts | None = None

    def forward(self, hidden_TD: Tensor, root_tokens_T: Tensor) -> Tensor:
        """Return the hidden state of every head, KTD, in the weights' dtype.

        Args:
            hidden_TD: The base model's last hidden states, after its final norm.
            root_tokens_T: Int64 token that follows each position.
        """
        hidden_TD = hidden_TD.to(self.layer_weights.dtype)
        x_KTD = hidden_TD.expand(self.config.num_heads, -1, -1)
        if self.root_weights is not None:
            root_TD = F.embedding(root_tokens_T, self._input_embedding_VD).to(hidden_TD.dtype)
            # All heads map the same embedding, so their maps are one product, X = K * D wide.
            mapped_TX = F.linear(root_TD, self.root_weights.flatten(0, 1))
            x_KTD = x_KTD + mapped_TX.view(len(root_TD), *x_KTD.shape[::2]).transpose(0, 1)
        for weight_KDD, bias_KD in zip(self.layer_weights, self.layer_biases, strict=True):
            inner_KTD = torch.baddbmm(bias_KD.unsqueeze(1), x_KTD, weight_KDD.transpose(1, 2))
            x_KTD = x_KTD + F.silu(inner_KTD)
        return x_KTD

    def draft_logits(self, head_hidden_KTD: Tensor) -> Tensor:
        """Return logits over the draft vocabulary, KTU, in the order of `draft_vocab_ids`."""
        if self.unembedding_KVD is not None:
            return torch.bmm(head_hidden_KTD, self.unembedding_KVD.transpose(1, 2))
        return F.linear(head_hidden_KTD, self.draft_rows_UD)

    def draft_rows(self, head: int) -> Tensor:
        """Return the unembedding UD of one head, in the order of `draft_vocab_ids`; no copy."""
        return self.draft_rows_UD if self.unembedding_KVD is None else self.unembedding_KVD[head]

    def freeze(self, make_product: MakeProduct) -> None:
        """Let `propose` compute with faster products, until other weights are loaded.

        The weights must not be written to, and the module must not move. Products may be less
        exact than the plain ones: what is drafted decides about speed alone.
        """
        self._frozen = _FrozenProducts(self, make_product)

    def _frozen_unembedding(self) -> PackedProduct:
        # Built on first use, and again when the module has moved to another device or dtype.
        if self._unembed is None or self._unembed.weight_OI is not self.draft_rows_UD:
            self._unembed = PackedProduct(self.draft_rows_UD)
        return self._unembed

    @torch.inference_mode()
    def seen_rows(self, prompt_token_ids: Sequence[int]) -> SeenRows | None:
        """Gather the rows of a prompt's tokens that the heads cannot draft otherwise.

        Call it once per request: it copies rows.

        Returns:
            At most `MAX_SEEN_ROWS` tokens, the most recent ones of the prompt; None if the whole
            prompt is in the draft vocabulary.
        """
        found = gather_seen_rows(prompt_token_ids, self._draft_vocab, self._unembedding_VD)
        return None if found is None else found.to(self.draft_rows_UD.dtype)

    @torch.inference_mode()
    def propose(
        self,
        hidden_BD: Tensor,
        root_tokens_B: Tensor,
        num_ranks: int,
        seen: Sequence[SeenRows | None],
    ) -> Candidates:
        """Propose each head's most probable tokens for a batch of sequences.

        Log-probs are over the draft vocabulary and the sequence's seen tokens together.

        Args:
            hidden_BD: Last hidden state of each sequence, after the base model's final norm.
            root_tokens_B: Int64 token that follows it.
            num_ranks: Candidates per head; padded where there are fewer tokens to draft.
            seen: For each sequence what `seen_rows` returned for its prompt.

        Raises:
            ValueError: If num_ranks is less than 1, or `seen` has not one entry per sequence.
        """
        if num_ranks < 1:
            raise ValueError(f"num_ranks is {num_ranks}; give at least 1")
        if len(seen) != len(hidden_BD):
            raise ValueError(f"seen has {len(seen)} entries; give {len(hidden_BD)}, one a sequence")
        frozen = self._frozen
        if frozen is None:
            head_hidden_KBD = self(hidden_BD, root_tokens_B)
        else:
            root_BD = F.embedding(root_tokens_B, self._input_embedding_VD)
            head_hidden_KBD = frozen.hidden(hidden_BD, root_BD)
        head_hidden_BKD = head_hidden_KBD.transpose(0, 1)
        if frozen is not None and frozen.unembed is not None:
            logits_BKU = frozen.unembed(head_hidden_BKD)
        elif self.unembedding_KVD is None:
            logits_BKU = self._frozen_unembedding()(head_hidden_BKD)
        else:
            logits_BKU = self.draft_logits(head_hidden_KBD).transpose(0, 1)
        return top_candidates(head_hidden_BKD, logits_BKU, self.draft_vocab_ids, num_ranks, seen)


class _FrozenProducts:
    """What heads compute, by products with matrices that no longer change.

    Attributes:
        unembed: Logits over the draft vocabulary; None if heads have matrices of their own.
    """

    def __init__(self, heads: MedusaHeads, make_product: MakeProduct) -> None:
        self._num_heads = heads.config.num_heads
        root_weights = heads.root_weights
        self._map_root = (
            None if root_weights is None else make_product(root_weights.detach().flatten(0, 1))
        )
        self._biases = heads.layer_biases.detach().unsqueeze(2)
        self._layers = [
            [make_product(weight_DD) for weight_DD in weight_KDD]
            for weight_KDD in heads.layer_weights.detach()
        ]
        has_own = heads.unembedding_KVD is not None
        self.unembed = None if has_own else make_product(heads.draft_rows_UD)

    def hidden(self, hidden_BD: Tensor, root_BD: Tensor) -> Tensor:
        """Return what `MedusaHeads.forward` does, from the embeddings of the root tokens."""
        x_KBD = hidden_BD.to(self._biases.dtype).expand(self._num_heads, -1, -1)
        if self._map_root is not None:
            mapped_BX = self._map_root(root_BD.to(self._biases.dtype))
            x_KBD = x_KBD + mapped_BX.view(len(root_BD), *x_KBD.shape[::2]).transpose(0, 1)
        for map_heads, bias_K1D in zip(self._layers, self._biases, strict=True):
            inner_KBD = torch.stack(
                [map_head(x_BD) for map_head, x_BD in zip(map_heads, x_KBD, strict=True)]
            )
            x_KBD = x_KBD + F.silu(inner_KBD + bias_K1D)
        return x_KBD


def _check_matrix(name: str, matrix_VD: Tensor, config: MedusaConfig) -> None:
    expected = (config.vocab_size, config.hidden_size)
    if tuple(matrix_VD.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(matrix_VD.shape)}; the heads' config asks for {expected}"
        )


def _checked_draft_vocab(draft_vocab_ids: Tensor | None, config: MedusaConfig) -> Tensor:
    if config.draft_vocab_size is None:
        if draft_vocab_ids is not None:
            raise ValueError(
                f"{len(draft_vocab_ids)} draft vocabulary ids, but draft_vocab_size is None; "
                "leave the ids out or set draft_vocab_size"
            )
        return torch.arange(config.vocab_size)
    if draft_vocab_ids is None or draft_vocab_ids.shape != (config.draft_vocab_size,):
        shape = None if draft_vocab_ids is None else tuple(draft_vocab_ids.shape)
        raise ValueError(
            f"draft_vocab_ids has shape {shape}; give one id for each of the "
            f"{config.draft_vocab_size} entries of the draft vocabulary"
        )
    ids_U = draft_vocab_ids.to(torch.int64)
    low, high, num_distinct = int(ids_U.min()), int(ids_U.max()), len(set(ids_U.tolist()))
    if low < 0 or high >= config.vocab_size or num_distinct != len(ids_U):
        raise ValueError(
            f"draft_vocab_ids span {low} to {high}, {num_distinct} of {len(ids_U)} are distinct; "
            f"give distinct ids of 0 to {config.vocab_size - 1}"
        )
    return ids_U
