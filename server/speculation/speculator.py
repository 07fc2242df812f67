"""Has drafts made after a step: asks the heads where they pay, and builds trees.

Shapes: B sequences, D model width.
"""

import time
from collections.abc import Sequence as Seq

from torch import Tensor

from heads.lookup import LookupIndex
from server.config import Method
from server.core.sequence import DraftSources, Sequence
from server.speculation.drafter import Drafter
from server.speculation.tree_builders import TreeBuilder
from server.speculation.tree_sizes import TreeSizes


class Speculator:
    """Has drafts made after a step, for the next one.

    Args:
        drafter: The draft heads; None if none are loaded.
        trees: Makes trees.
        sizes: Chooses how much of them is verified.
    """

    def __init__(self, drafter: Drafter | None, trees: TreeBuilder, sizes: TreeSizes) -> None:
        self.drafter = drafter
        self.trees = trees
        self.sizes = sizes

    @property
    def methods(self) -> frozenset[str]:
        """What requests may name as their method."""
        loaded = () if self.drafter is None else (self.drafter.method,)
        return frozenset(
            ("auto", "none", *loaded, *(("lookup",) if self.trees.uses_lookup else ()))
        )

    def sources(self, method: Method) -> DraftSources:
        """Who drafts for a request of that method, which is one of `methods`."""
        heads = None if self.drafter is None else self.drafter.method
        return DraftSources(
            heads if method in ("auto", heads) else None,
            self.trees.uses_lookup and method in ("auto", "lookup"),
        )

    def prepare(self, sequence: Sequence) -> None:
        """Gather what drafting needs of a prompt; once per request."""
        if sequence.sources.heads is not None and self.drafter is not None:
            sequence.seen_rows = self.drafter.seen_rows(sequence.request.prompt_token_ids)
        if sequence.sources.lookup:
            reference = sequence.request.prediction_token_ids
            sequence.lookup = LookupIndex(sequence.token_ids, reference)

    def propose(
        self,
        rooted: Seq[Sequence],
        hidden_BD: Tensor,
        prefilling: Seq[Sequence],
        num_decoding: int,
    ) -> None:
        """Leave a proposal on each sequence that may be drafted for.

        Args:
            rooted: Their last tokens are the next step's roots.
            hidden_BD: The base model's hidden state from which each of these roots was drawn.
            prefilling: Sequences whose prompt goes on in the next step.
            num_decoding: Sequences that decode in the next step, drafted for or not.
        """
        self._run_heads(rooted, hidden_BD, prefilling, num_decoding)
        for sequence in rooted:
            sequence.proposal = self.trees.build(sequence, self.sizes.least_value())

    def _run_heads(
        self,
        rooted: Seq[Sequence],
        hidden_BD: Tensor,
        prefilling: Seq[Sequence],
        num_decoding: int,
    ) -> None:
        headed = [index for index, sequence in enumerate(rooted) if sequence.sources.heads]
        following = [sequence for sequence in prefilling if sequence.sources.heads]
        if self.drafter is None or not (headed or following):
            return
        if not self.sizes.wants_heads(max(1, num_decoding)):
            return
        started_s = time.perf_counter()
        self.drafter.propose(
            [rooted[index] for index in headed],
            hidden_BD[headed],
            following,
            self.sizes.least_value(),
        )
        # Following prompts is no part of what drafting costs.
        if headed and not following:
            self.sizes.learn_draft(len(headed), time.perf_counter() - started_s)
