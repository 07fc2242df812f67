"""The face of speculation: who drafts for whom, which trees come of it, and how large they are.

The engine asks for four things in every step: `plan` says how large the trees are, `asks` which
device sources draft behind the step, `learn` takes note of what became of it, and `propose` makes
the trees of the next one.
"""

from collections.abc import Sequence as Seq

from heads.calibration import Calibrator
from heads.merged_tree import Allows, TreeLimits, merge_proposals
from heads.proposals import Proposal
from server.core.sequence import Sequence
from server.core.step import DraftAsk, Outcome, StepEntry, verified
from server.executor.executor import Drafter, Landing
from server.speculation.cost_model import StepLoad
from server.speculation.planner import StepRequest
from server.speculation.source import DraftSource
from server.speculation.tree_sizes import SizeStats, StepRecord, TreeSizes

_MAX_DEPTH = 24


class Speculator:
    """Has drafts made behind a step, for the next one.

    Args:
        sources: Draft sources of this server, in the order of their table.
        sizes: Chooses how many of the drafts are verified.
        max_nodes: Largest tree, root included.
    """

    def __init__(self, sources: Seq[DraftSource], sizes: TreeSizes, max_nodes: int) -> None:
        self.sources = {source.name: source for source in sources}
        self._sizes = sizes
        self._max_nodes = max_nodes
        self._calibrator = Calibrator({source.name: source.ratios for source in sources})

    @property
    def drafters(self) -> dict[str, Drafter]:
        """The parts of the sources that an executor runs."""
        drafters = ((name, source.drafter) for name, source in self.sources.items())
        return {name: drafter for name, drafter in drafters if drafter is not None}

    @property
    def methods(self) -> frozenset[str]:
        """What requests may name as their method."""
        return frozenset(("auto", "none", *self.sources))

    def sources_of(self, method: str) -> tuple[str, ...]:
        """Names of the sources that draft for a request of that method, one of `methods`."""
        return tuple(name for name in self.sources if method in ("auto", name))

    def prepare(self, sequence: Sequence) -> None:
        """Gather what drafting needs of a prompt; once per request."""
        for name in sequence.sources:
            self.sources[name].prepare(sequence)

    def admit(self, sequence: Sequence) -> None:
        """Take note that a prepared sequence got its blocks."""
        for name in sequence.sources:
            self.sources[name].admit(sequence)

    def plan(self, decoding: Seq[Sequence], request: StepRequest) -> list[int]:
        """Nodes of each decoding sequence's tree, root included."""
        return self._sizes.choose(decoding, request)

    def asks(self, entries: Seq[StepEntry]) -> tuple[DraftAsk, ...]:
        """Which device sources draft behind a step, and for whom; reserves what they need."""
        rooted, following = [], []
        num_decoding = 0
        for index, entry in enumerate(entries):
            sequence = entry.sequence
            # The step itself brings one token at least.
            goes_on = entry.is_verified and sequence.num_lacking_tokens > 1
            num_decoding += goes_on
            if not entry.is_verified:
                following.append(index)
            elif goes_on:
                rooted.append(index)
        asks = []
        for name in self.drafters:
            headed = tuple(i for i in rooted if name in entries[i].sequence.sources)
            followed = tuple(i for i in following if name in entries[i].sequence.sources)
            if headed or followed:
                asks.append(DraftAsk(name, headed, followed, self._sizes.least_value()))
        if not asks or not self._sizes.wants_heads(max(1, num_decoding)):
            return ()
        for ask in asks:
            for index in ask.rooted:
                self.sources[ask.source].reserve(entries[index])
        return tuple(asks)

    def learn(self, outcomes: Seq[Outcome], landing: Landing) -> None:
        """Take note of what a step cost, and of which drafts were accepted.

        Args:
            outcomes: Of the sequences that are still there.
            landing: As the step landed.
        """
        # Prompts are known to the planner by their tokens alone.
        num_decoding = sum(outcome.entry.is_decoding for outcome in outcomes)
        num_kv_tokens = sum(outcome.entry.sequence.num_computed_tokens for outcome in outcomes)
        self._sizes.learn(
            StepRecord(
                num_tokens=sum(outcome.entry.num_tokens for outcome in outcomes),
                load=StepLoad(max(1, num_decoding), num_kv_tokens),
                num_emitted=sum(
                    len(outcome.token_ids) for outcome in outcomes if outcome.entry.is_decoding
                ),
                step_s=landing.step_s,
                # Following prompts is no part of what drafting costs.
                drafts=tuple(
                    (run.num_rooted, run.seconds)
                    for run in landing.draft_runs
                    if run.num_rooted and not run.num_following
                ),
            )
        )
        for outcome in outcomes:
            sequence = outcome.entry.sequence
            accepted = outcome.entry.drafts.outcomes(outcome.path)
            self._calibrator.learn(accepted)
            sequence.calibration.learn(accepted)
            for name in sequence.sources:
                self.sources[name].learn(outcome)

    def propose(self, outcomes: Seq[Outcome]) -> None:
        """Leave a tree on each sequence that goes on."""
        for outcome in verified(outcomes):
            sequence = outcome.entry.sequence
            sequence.proposal, sequence.has_device_drafts = None, False
            if sequence.sources and outcome.finish_reason is None:
                proposals = self._proposals(sequence, outcome.landed.proposals)
                sequence.has_device_drafts = bool(outcome.landed.proposals)
                sequence.proposal = merge_proposals(
                    sequence.token_ids[-1],
                    proposals,
                    self._calibrator,
                    sequence.calibration,
                    self._limits(sequence),
                )

    def stats(self) -> SizeStats:
        """What steps are believed to cost, and how well that held."""
        return self._sizes.stats()

    def _proposals(self, sequence: Sequence, landed: Seq[Proposal]) -> list[Proposal]:
        """What all sources of a sequence say, in their order."""
        found = {proposal.source: proposal for proposal in landed}
        for name in sequence.sources:
            source = self.sources[name]
            proposal = None if source.drafter is not None else source.propose(sequence)
            if proposal is not None:
                found[name] = proposal
        return [found[name] for name in sequence.sources if name in found]

    def _limits(self, sequence: Sequence) -> TreeLimits:
        return TreeLimits(
            min(self._max_nodes, sequence.drafts_allowed),
            min(_MAX_DEPTH, sequence.num_lacking_tokens - 1),
            self._sizes.least_value(),
            _allows(sequence),
        )


def _allows(sequence: Sequence) -> Allows | None:
    """Which drafts the sequence's logit processors let through; None if all."""
    restricting = [processor for processor in sequence.processors if processor.restricts]
    if not restricting:
        return None
    return lambda path, token_id: all(one.allows(path, token_id) for one in restricting)
