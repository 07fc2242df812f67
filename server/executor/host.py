"""Runs steps on one device from this process: packing, forward pass, verification, drafting.

Nothing runs before a flight lands: where waiting and computing are the same, work that is done at
launch would only delay the outputs of the step before. So a sequence that a stop string has ended
since costs nothing either.

Shapes: S rows of logits of the step, B sequences, D model width.
"""

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from heads.proposals import Proposal
from server.attention.backend import AttentionBatch, AttentionSpan
from server.core.step import DraftAsk, Landed, Step, StepEntry, Verdict
from server.device.create import create_device
from server.executor.batch import StepBatch, build_batch
from server.executor.executor import Drafter, Drafting, DraftRun, Landing
from server.executor.model_runner import ModelRunner, TargetOutput
from server.kv.kv_cache import KVLayout
from server.sampling.verify import token_logprobs, verify


class HostExecutor:
    """Runs steps one after the other, each when it lands.

    Args:
        runner: The base model over the KV cache.
        layout: Layout of that cache.
        drafters: Device draft sources by name.
    """

    def __init__(
        self, runner: ModelRunner, layout: KVLayout, drafters: Mapping[str, Drafter]
    ) -> None:
        self.runner = runner
        self.layout = layout
        self.drafters = drafters
        self._device = create_device(layout.device)

    def launch(self, step: Step) -> "HostFlight":
        """Keep the step until it lands."""
        return HostFlight(self, step)

    def hidden_states(self, block_table: Seq[int], count: int) -> Tensor:
        """Copy hidden states out of the cache."""
        return self.runner.hidden_states(block_table, count)

    def time_step(self, num_tokens: int, num_sequences: int, context_len: int) -> float:
        """Time a forward pass; all sequences read and write the same blocks."""
        device = self.layout.device
        positions = torch.arange(context_len, context_len + num_tokens, device=device)
        positions = positions.repeat(num_sequences)
        table = list(range(-(-(context_len + num_tokens) // self.layout.block_size)))
        spans = tuple(
            AttentionSpan(index * num_tokens, num_tokens, context_len, table, None, None)
            for index in range(num_sequences)
        )
        batch = StepBatch(
            input_ids_T=torch.zeros_like(positions),
            positions_T=positions,
            logits_rows_S=torch.arange(len(positions), device=device),
            attention=AttentionBatch(spans, positions),
            first_rows=(),
        )
        started_s = time.perf_counter()
        self.runner.run(batch)
        self._device.synchronize()
        return time.perf_counter() - started_s

    def time_drafts(self, num_sequences: int, context_len: int) -> float:
        """Time all drafters, one after the other."""
        started_s = time.perf_counter()
        for drafter in self.drafters.values():
            drafter.draft_for(num_sequences, context_len)
        self._device.synchronize()
        return time.perf_counter() - started_s


class HostFlight:
    """A step that is computed when it lands; sequences that have ended by then are left out."""

    def __init__(self, executor: HostExecutor, step: Step) -> None:
        self._executor = executor
        self._step = step
        self._stage_s: dict[str, float] = {}
        # Row of the root's logits of each entry that takes part and is verified, by its index.
        self._first_rows: dict[int, int] = {}

    @torch.inference_mode()
    def land(self) -> Landing:
        """Compute the step, and everything that follows from it."""
        runner, layout = self._executor.runner, self._executor.layout
        entries = self._step.entries
        taking_part = [i for i, entry in enumerate(entries) if not entry.sequence.is_ended]
        started_s = time.perf_counter()
        batch = build_batch([entries[index] for index in taking_part], layout)
        rows = zip(taking_part, batch.first_rows, strict=True)
        self._first_rows = {index: row for index, row in rows if row >= 0}
        started_s = self._note("pack", started_s)
        target = runner.run(batch)
        started_s = self._note("forward", started_s)
        landed = self._verify(target)
        started_s = self._note("verify", started_s)
        verdicts = [one.verdict for one in landed]
        runner.compact(*_moves(entries, verdicts, layout))
        started_s = self._note("compact", started_s)
        step_s = sum(self._stage_s.values())
        proposals: list[list[Proposal]] = [[] for _ in entries]
        runs = [self._draft(ask, verdicts, target, proposals) for ask in self._step.asks]
        self._note("draft", started_s)
        drafted = (
            replace(one, proposals=tuple(own)) for one, own in zip(landed, proposals, strict=True)
        )
        return Landing(tuple(drafted), step_s, tuple(filter(None, runs)), self._stage_s)

    def _note(self, stage: str, started_s: float) -> float:
        """Take the time of a stage; returns the next one's start."""
        now_s = time.perf_counter()
        self._stage_s[stage] = now_s - started_s
        return now_s

    def _verify(self, target: TargetOutput) -> list[Landed]:
        """Verdicts and log-probabilities of all entries."""
        landed = [Landed()] * len(self._step.entries)
        if not self._first_rows:
            return landed
        verified, rows = list(self._first_rows), list(self._first_rows.values())
        entries = [self._step.entries[index] for index in verified]
        verdicts = verify(target.logits_SV, entries, rows)
        for index, entry, row, verdict in zip(verified, entries, rows, verdicts, strict=True):
            logprobs = token_logprobs(target.logits_SV, entry, row, verdict)
            landed[index] = Landed(verdict, logprobs)
        return landed

    def _draft(
        self,
        ask: DraftAsk,
        verdicts: Seq[Verdict | None],
        target: TargetOutput,
        proposals: list[list[Proposal]],
    ) -> DraftRun | None:
        """Let one source draft, and add what it proposes; None if nobody goes on."""
        started_s = time.perf_counter()
        asked, rooted, rows = [], [], []
        for index in ask.rooted:
            entry, verdict = self._step.entries[index], verdicts[index]
            if verdict is None:
                continue  # it has ended
            drafting = _drafting(entry, verdict)
            if entry.sequence.end_among(drafting.new_ids)[1] is None:
                asked.append(index)
                rooted.append(drafting)
                rows.append(self._first_rows[index] + verdict.path[-1])
        following = [
            _drafting(entry, None)
            for entry in (self._step.entries[index] for index in ask.following)
            if not entry.sequence.is_ended
        ]
        if not (rooted or following):
            return None
        drafter = self._executor.drafters[ask.source]
        found = drafter.draft(rooted, target.hidden_SD[rows], following, ask.min_value)
        for index, proposal in zip(asked, found, strict=True):
            if proposal is not None:
                proposals[index].append(proposal)
        seconds = time.perf_counter() - started_s
        return DraftRun(ask.source, len(rooted), len(following), seconds)


def _drafting(entry: StepEntry, verdict: Verdict | None) -> Drafting:
    """The entry's sequence as it is after the step."""
    num_computed = entry.sequence.num_computed_tokens + entry.num_committed
    if verdict is None:
        return Drafting(entry.sequence, (), num_computed)
    accepted = [entry.drafts.token_ids[node] for node in verdict.path[1:]]
    return Drafting(entry.sequence, (*accepted, verdict.bonus_token), num_computed + len(accepted))


def _moves(
    entries: Seq[StepEntry], verdicts: Seq[Verdict | None], layout: KVLayout
) -> tuple[list[int], list[int]]:
    """From which slots to which the KV of accepted nodes moves that is not at its position."""
    sources: list[int] = []
    targets: list[int] = []
    for entry, verdict in zip(entries, verdicts, strict=True):
        if verdict is None:
            continue
        table, root = entry.sequence.block_table, entry.root_position
        for index, node in enumerate(verdict.path):
            if node != index:
                sources.append(layout.slot(table, root + node))
                targets.append(layout.slot(table, root + index))
    return sources, targets
