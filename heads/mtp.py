"""The MTP module: one decoder layer that drafts a token at a time from its own output.

Slot i of the module's attention belongs to token i, and its input is that token with the hidden
state *before* it:

    depth 1   u_i = M [RMSNorm(h_{i-1}); RMSNorm(Emb(x_i))]      h from the base model
    depth d   the same with the module's own output at i - 1, of depth d - 1, in place of h_{i-1}

then the layer, a final norm, and the base model's frozen unembedding over a draft vocabulary. The
output at i drafts the token i + 1. The root's hidden state is known when it is drafted for, so the
root runs at depth 1; after verification the accepted tokens run again at depth 1. The first token
of all has no state before it: zeros.

Source: DeepSeek-V3, arXiv:2412.19437, 2.2; the slot of a pair is that of its token, not of its
hidden state, so that base and module share block tables.

Owns the weights, and knows neither the layer's class nor its attention: the caller brings both. The
layer is called `block`, since its weights have that name in checkpoints.

Shape suffixes: T flat tokens, D model width, U draft vocabulary, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads.seen_rows import SeenRows, gather_seen_rows


@dataclass(frozen=True, slots=True)
class MTPConfig:
    """Shape of an MTP module.

    Attributes:
        hidden_size: Width of the base model and of the decoder layer.
        vocab_size: Rows of the base model's unembedding.
        draft_vocab_size: Tokens that the module can draft; the whole vocabulary costs no memory.
        norm_eps: Epsilon of the RMS norms.

    Raises:
        ValueError: If a size is less than 1, or the draft vocabulary exceeds the vocabulary.
    """

    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "draft_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocab_size}; give at most vocab_size "
                f"({self.vocab_size})"
            )


class MTPModule(nn.Module):
    """One level of drafting: states and tokens in, states of the next level out.

    Fresh modules pass the hidden state to the layer as it is, and the token not at all.

    Args:
        block: A decoder layer of the base model's shape, with weights of its own.
        unembedding_VD: The base model's unembedding, used by reference and frozen.
        input_embedding_VD: The base model's input embedding, used likewise.
        draft_vocab_ids: Distinct ids of the draft vocabulary, `config.draft_vocab_size` of them.

    Attributes:
        draft_vocab_ids: Int64 [U]; in the state dict.

    Raises:
        ValueError: If a matrix or the draft vocabulary does not fit the config.
    """

    draft_vocab_ids: Tensor
    draft_rows_UD: Tensor

    def __init__(
        self,
        config: MTPConfig,
        block: nn.Module,
        unembedding_VD: Tensor,
        input_embedding_VD: Tensor,
        draft_vocab_ids: Tensor,
    ) -> None:
        super().__init__()
        expected = (config.vocab_size, config.hidden_size)
        for name, matrix in (
            ("unembedding_VD", unembedding_VD),
            ("input_embedding_VD", input_embedding_VD),
        ):
            if tuple(matrix.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(matrix.shape)}; give {expected}")
        if draft_vocab_ids.shape != (config.draft_vocab_size,):
            raise ValueError(
                f"draft_vocab_ids has shape {tuple(draft_vocab_ids.shape)}; give "
                f"{config.draft_vocab_size} ids"
            )
        self.config = config
        self._unembedding_VD = unembedding_VD.detach()
        self._input_embedding_VD = input_embedding_VD.detach()
        width, eps = config.hidden_size, config.norm_eps
        self.hidden_norm = nn.RMSNorm(width, eps)
        self.embedding_norm = nn.RMSNorm(width, eps)
        self.projection = nn.Linear(2 * width, width, bias=False)
        self.block = block
        self.final_norm = nn.RMSNorm(width, eps)
        with torch.no_grad():
            self.projection.weight.zero_()
            self.projection.weight[:, :width].fill_diagonal_(1.0)
        # A copy, because a state dict is loaded into it.
        self.register_buffer("draft_vocab_ids", draft_vocab_ids.to(torch.int64, copy=True))
        self._gather_draft_rows()
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda module, _: module._gather_draft_rows()
        )

    def _gather_draft_rows(self) -> None:
        rows_UD, ids = self._unembedding_VD, self.draft_vocab_ids
        if not torch.equal(ids, torch.arange(len(rows_UD), device=ids.device)):
            rows_UD = rows_UD.index_select(0, ids)
        self.register_buffer("draft_rows_UD", rows_UD, persistent=False)
        self._draft_vocab = frozenset(self.draft_vocab_ids.tolist())

    def forward(
        self, states_TD: Tensor, token_ids_T: Tensor, run_block: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the states TD from which the tokens after `token_ids_T` are drafted.

        Args:
            states_TD: For each token the state before it: the base model's last hidden state after
                its final norm, or this module's output.
            token_ids_T: Int64 tokens.
            run_block: Runs `block` on TD with positions, attention and KV of these tokens.
        """
        embedded_TD = F.embedding(token_ids_T, self._input_embedding_VD)
        # The projection may have been packed, and then has no plain weight.
        dtype = self.final_norm.weight.dtype
        joined_TX = torch.cat(
            (self.hidden_norm(states_TD.to(dtype)), self.embedding_norm(embedded_TD.to(dtype))), 1
        )
        # Under autocast the layer returns another dtype.
        states: Tensor = self.final_norm(run_block(self.projection(joined_TX)).to(dtype))
        return states

    @torch.inference_mode()
    def seen_rows(self, prompt_token_ids: Sequence[int]) -> SeenRows | None:
        """Gather the rows of a prompt's tokens that the module cannot draft otherwise.

        Call it once per request, because it copies rows.
        """
        found = gather_seen_rows(prompt_token_ids, self._draft_vocab, self._unembedding_VD)
        return None if found is None else found.to(self.draft_rows_UD.dtype)

    def draft_logits(self, states_TD: Tensor) -> Tensor:
        """Return logits over the draft vocabulary, TU, in the order of `draft_vocab_ids`."""
        return F.linear(states_TD, self.draft_rows_UD.to(states_TD.dtype))
