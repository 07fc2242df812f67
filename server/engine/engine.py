"""The engine: each step verifies a draft tree of every running sequence in one forward pass.

Plain decoding is the one-node tree, and the last chunk of a prompt ends in one, so no step asks
whether it speculates. Single-threaded; `AsyncEngine` runs it off the event loop.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from itertools import accumulate

import torch
from torch import Tensor

from server.config import EngineConfig
from server.core.completion import Completion, join_outputs
from server.core.request import (
    Request,
    RequestOutput,
)
from server.core.sequence import DraftSources, Sequence, acceptance_rule, request_seed
from server.core.step import StepEntry
from server.core.text import TextStream
from server.engine.build import EngineParts, build_parts
from server.engine.output import Emission, emit, request_output, token_logprobs
from server.engine.scheduler import Scheduler
from server.executor.batch import build_batch
from server.executor.model_runner import TargetOutput
from server.sampling.logits import make_adjuster
from server.sampling.verify import Verdict, verify
from server.speculation.cost_model import StepLoad

# Gets a request's tokens, and the base model's hidden states of all of them but the last.
OnHidden = Callable[[Seq[int], Tensor], None]


@dataclass(slots=True)
class EngineCounters:
    """Totals since the engine was built."""

    num_steps: int = 0
    num_verify_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0


class Engine:
    """Continuous batching over draft trees.

    Args:
        parts: With a cache that has room for hidden states if `on_hidden` is given.
        on_hidden: Called at the end of each request all of whose hidden states are computed.

    Attributes:
        counters: Totals for metrics and benches.
    """

    def __init__(self, parts: EngineParts, on_hidden: OnHidden | None = None) -> None:
        self.config = parts.config
        self.loaded = parts.loaded
        self.tokenizer = parts.loaded.tokenizer
        self.limits = parts.limits
        self.heads_name = parts.heads_name
        self.is_compiled = parts.is_compiled
        self.speculator = parts.speculator
        self.blocks = parts.blocks
        self.counters = EngineCounters()
        self._runner = parts.runner
        self._on_hidden = on_hidden
        self._scheduler = Scheduler(parts.config, parts.blocks, parts.speculator)
        self._sequences: dict[str, Sequence] = {}

    @classmethod
    def from_config(cls, config: EngineConfig, on_hidden: OnHidden | None = None) -> "Engine":
        """Load the model and its heads, size the KV cache and measure the step cost.

        Each stage begins with a line in the log.

        Args:
            config: Validated options.
            on_hidden: See `Engine`.

        Raises:
            ConfigError: If the KV cache does not fit, or a path is wrong.
            ModelError: If the model cannot be loaded or is not supported.
            HeadsMismatchError: If the heads belong to another base model.
        """
        return cls(build_parts(config, on_hidden is not None), on_hidden)

    @property
    def model_name(self) -> str:
        """The base model as the configuration names it."""
        return self.loaded.name

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output."""
        return self.limits.max_model_len

    @property
    def has_unfinished(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self._sequences)

    def totals(self) -> dict[str, int]:
        """Current totals and gauges by name; safe to call from any thread."""
        return {
            **asdict(self.counters),
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "num_blocks_in_use": self.blocks.num_in_use,
            "num_blocks": self.blocks.num_blocks,
        }

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for admission, preempted ones included."""
        return len(self._scheduler.waiting)

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: If it can never run on this server.
        """
        self.limits.check(request)
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id!r} is already in flight")
        speculation = request.speculation
        sources = self.speculator.sources(speculation.method)
        max_nodes = min(speculation.max_nodes or self.config.max_nodes, self.config.max_nodes)
        if max_nodes == 1:
            sources = DraftSources()
        sequence = Sequence(
            request=request,
            text=TextStream(
                self.tokenizer.detokenizer(request.prompt_token_ids), request.sampling.stop
            ),
            seed=request_seed(request),
            acceptance=acceptance_rule(request, self.config.acceptance),
            drafts_allowed=max_nodes if sources.any else 1,
            sources=sources,
            token_ids=list(request.prompt_token_ids),
        )
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks at once; unknown ids are ended requests."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        count = len(sequence.token_ids) - 1
        if self._on_hidden is not None and sequence.num_computed_tokens == count:
            hidden_XD = self._runner.hidden_states(sequence.block_table, count)
            self._on_hidden(sequence.token_ids, hidden_XD)
        self._scheduler.finish(sequence)
        del self._sequences[sequence.request.request_id]

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run one forward pass; one output for each request that got tokens."""
        plan = self._scheduler.schedule()
        if not plan:
            return []
        self._prepare(plan)
        started_s = time.perf_counter()
        batch = build_batch(plan, self.config.block_size, self.loaded.device)
        target = self._runner.run(batch)
        verified = [item for item in plan if item.is_verified]
        verdicts = verify(target.logits_SV, verified) if verified else []
        self._compact(verified, verdicts)
        emissions = [
            emit(item, verdict, self.loaded.eos_token_ids, self.limits.max_model_len)
            for item, verdict in zip(verified, verdicts, strict=True)
        ]
        self._advance(plan, verdicts)
        self._learn(plan, verdicts, emissions, time.perf_counter() - started_s)
        self._propose(plan, verdicts, emissions, target)
        self._count(plan, emissions)
        return self._outputs(verified, verdicts, emissions, target)

    def generate(self, requests: Seq[Request]) -> list[Completion]:
        """Run requests to their end, together; in the order given."""
        for request in requests:
            self.limits.check(request)
        for request in requests:
            self.add_request(request)
        pieces: dict[str, list[RequestOutput]] = {r.request_id: [] for r in requests}
        while self.has_unfinished:
            for output in self.step():
                pieces[output.request_id].append(output)
        return [join_outputs(pieces[request.request_id]) for request in requests]

    def _prepare(self, plan: Seq[StepEntry]) -> None:
        """Build the tensors of sequences that run for the first time; queued ones need none."""
        for item in plan:
            sequence = item.sequence
            if sequence.is_prepared:
                continue
            request = sequence.request
            sequence.is_prepared = True
            sequence.adjuster = make_adjuster(
                request.sampling,
                request.prompt_token_ids,
                self.loaded.vocab_size,
                self.loaded.device,
            )
            self.speculator.prepare(sequence)

    def _compact(self, items: Seq[StepEntry], verdicts: Seq[Verdict]) -> None:
        """Move the KV of accepted nodes that do not already lie at their positions."""
        size = self.config.block_size
        sources: list[int] = []
        targets: list[int] = []
        for item, verdict in zip(items, verdicts, strict=True):
            table = item.sequence.block_table
            root = item.sequence.num_computed_tokens + item.num_committed - 1
            for index, node in enumerate(verdict.path):
                if node != index:
                    source, target = root + node, root + index
                    sources.append(table[source // size] * size + source % size)
                    targets.append(table[target // size] * size + target % size)
        self._runner.compact(sources, targets)

    def _advance(self, plan: Seq[StepEntry], verdicts: Seq[Verdict]) -> None:
        """Count what is computed now; all committed tokens but the bonus token have KV."""
        accepted = iter(verdicts)
        for item in plan:
            sequence = item.sequence
            sequence.num_computed_tokens += item.num_committed
            if item.is_verified:
                sequence.num_computed_tokens += len(next(accepted).path) - 1
            # A stop may have cut accepted tokens off.
            limit = len(sequence.token_ids) - item.is_verified
            sequence.num_computed_tokens = min(sequence.num_computed_tokens, limit)
            self._scheduler.note_computed(sequence)

    def _learn(
        self,
        plan: Seq[StepEntry],
        verdicts: Seq[Verdict],
        emissions: Seq[Emission],
        step_s: float,
    ) -> None:
        """Tell the speculator what the step cost and which drafts were accepted."""
        num_tokens = sum(item.num_tokens for item in plan)
        num_kv_tokens = sum(item.sequence.num_computed_tokens for item in plan)
        verified = [item for item in plan if item.is_verified]
        num_emitted = sum(
            len(emission.token_ids)
            for item, emission in zip(verified, emissions, strict=True)
            if item.is_decoding
        )
        # As the planner counts them: prompts are known to it by their tokens alone.
        num_decoding = sum(item.is_decoding for item in plan)
        load = StepLoad(max(1, num_decoding), num_kv_tokens)
        self.speculator.sizes.learn_step(num_tokens, load, num_emitted, step_s)
        for item, verdict in zip(verified, verdicts, strict=True):
            self.speculator.trees.learn(item.sequence, item.drafts, verdict.path)

    def _propose(
        self,
        plan: Seq[StepEntry],
        verdicts: Seq[Verdict],
        emissions: Seq[Emission],
        target: TargetOutput,
    ) -> None:
        """Draft for the sequences that go on and may be drafted for."""
        rows: list[int] = []
        rooted: list[Sequence] = []
        prefilling: list[Sequence] = []
        first_row = num_decoding = 0
        results = zip(verdicts, emissions, strict=True)
        for item in plan:
            sequence = item.sequence
            may_draft = sequence.drafts_allowed > 1
            if not item.is_verified:
                prefilling += [sequence] * may_draft
                continue
            verdict, emission = next(results)
            sequence.proposal = sequence.head_proposal = None
            if emission.finish_reason is None:
                num_decoding += 1
                if may_draft:
                    rows.append(first_row + verdict.path[-1])
                    rooted.append(sequence)
            first_row += item.drafts.tree.num_nodes
        if rooted or prefilling:
            self.speculator.propose(rooted, target.hidden_SD[rows], prefilling, num_decoding)

    def _count(self, plan: Seq[StepEntry], emissions: Seq[Emission]) -> None:
        counters = self.counters
        counters.num_steps += 1
        counters.num_preemptions = self._scheduler.num_preemptions
        for item in plan:
            if item.is_decoding:
                counters.num_verify_steps += 1
                counters.num_draft_tokens += item.drafts.tree.num_nodes - 1
        for emission in emissions:
            counters.num_generated_tokens += len(emission.token_ids)
            counters.num_accepted_tokens += sum(depth > 0 for depth in emission.depths)

    def _outputs(
        self,
        items: Seq[StepEntry],
        verdicts: Seq[Verdict],
        emissions: Seq[Emission],
        target: TargetOutput,
    ) -> list[RequestOutput]:
        outputs = []
        sizes = [item.drafts.tree.num_nodes for item in items]
        for item, verdict, emission, end in zip(
            items, verdicts, emissions, accumulate(sizes), strict=True
        ):
            sequence = item.sequence
            logprobs = None
            num_top = sequence.request.sampling.logprobs
            if num_top is not None:
                logits_NV = target.logits_SV[end - item.drafts.tree.num_nodes : end]
                logprobs = token_logprobs(logits_NV, verdict, emission, num_top)
            if sequence.num_output_tokens == len(emission.token_ids):
                self.counters.num_prompt_tokens += sequence.num_prompt_tokens
                self.counters.num_cached_tokens += sequence.num_cached_tokens
            outputs.append(request_output(item, emission, logprobs))
            if emission.finish_reason is not None:
                self._end(sequence)
        return outputs
