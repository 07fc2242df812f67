"""Medusa heads as a draft source.

Shapes: B sequences, D model width.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from heads.calibration import head_ratios
from heads.medusa import MedusaHeads
from heads.proposals import MedusaProposal, Proposal
from heads.tree_search import AcceptanceProfile, best_tree
from server.core.sequence import Sequence
from server.executor.executor import Drafting
from server.model.draft_heads import DraftHeads
from server.speculation.source import DraftSource, SourceContext

# Candidates of each head that trees choose from, at least.
_MIN_RANKS = 8
# For heads that were saved without a measured profile; the rates are of weak heads, so that trees
# stay small rather than wasteful.
_CAUTIOUS_PROFILE = AcceptanceProfile(((0.35, 0.12, 0.06, 0.04), (0.2, 0.08, 0.04, 0.03)))


class MedusaDrafter:
    """Runs the heads on the hidden states that the next roots were drawn from.

    Args:
        heads: In the model's dtype, on its device.
        num_ranks: Candidates of each head.
    """

    def __init__(self, heads: MedusaHeads, num_ranks: int) -> None:
        self._heads = heads
        self._num_ranks = num_ranks

    @torch.inference_mode()
    def draft(
        self,
        rooted: Seq[Drafting],
        hidden_BD: Tensor,
        following: Seq[Drafting],
        min_value: float,
    ) -> list[Proposal | None]:
        """Ask all heads at once; prompts in progress need nothing."""
        if not rooted:
            return []
        roots_B = torch.tensor([one.new_ids[-1] for one in rooted], device=hidden_BD.device)
        seen = [one.sequence.drafting[MedusaSource.name] for one in rooted]
        candidates = self._heads.propose(hidden_BD, roots_B, self._num_ranks, seen)
        token_ids = candidates.token_ids_BKR.tolist()
        probabilities = candidates.log_probs_BKR.exp().tolist()
        return [
            MedusaProposal(ids_KR, probabilities_KR, MedusaSource.name)
            for ids_KR, probabilities_KR in zip(token_ids, probabilities, strict=True)
        ]

    @torch.inference_mode()
    def draft_for(self, num_sequences: int, context_len: int) -> None:
        """Run the heads on zeros."""
        rows = self._heads.draft_rows(0)
        roots_B = torch.zeros(num_sequences, dtype=torch.int64, device=rows.device)
        hidden_BD = rows.new_zeros(num_sequences, rows.shape[1])
        self._heads.propose(hidden_BD, roots_B, self._num_ranks, [None] * num_sequences)


class MedusaSource(DraftSource):
    """Drafts with Medusa heads; its state of a sequence is the prompt's `SeenRows`, or None."""

    name = "medusa"

    def __init__(self, heads: MedusaHeads, profile: AcceptanceProfile, max_nodes: int) -> None:
        self._heads = heads
        self.ratios = head_ratios(profile.calibration_KC or ())
        rates = AcceptanceProfile(profile.accept_rates_KR[: heads.config.num_heads])
        # Of heads that were measured to be useless the best tree is the root alone.
        tree = best_tree(rates, max_nodes)
        self.drafter = MedusaDrafter(heads, max(_MIN_RANKS, max(tree.ranks) + 1))

    def prepare(self, sequence: Sequence) -> None:
        """Gather the unembedding rows of prompt tokens that the draft vocabulary lacks."""
        prompt = sequence.request.prompt_token_ids
        sequence.drafting[self.name] = self._heads.seen_rows(prompt)


def make_medusa(context: SourceContext) -> MedusaSource | None:
    """Medusa heads, if such heads are loaded."""
    draft = context.draft
    if draft is None or not isinstance(draft.heads, MedusaHeads):
        return None
    if context.products.is_own:
        draft.heads.freeze(context.products.make)
    return MedusaSource(draft.heads, profile_of(draft), context.config.max_nodes)


def profile_of(draft: DraftHeads) -> AcceptanceProfile:
    """The measured accept rates of heads, or cautious ones."""
    return draft.profile or _CAUTIOUS_PROFILE
