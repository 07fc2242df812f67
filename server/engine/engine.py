"""The engine: each step verifies a draft tree of every running sequence in one forward pass.

Plain decoding is the one-node tree, and the last chunk of a prompt ends in one, so no step asks
whether it speculates. A step has four parts, the same on every device:

    land     wait for the step under way: accepted paths, drawn tokens, proposals
    commit   tokens, ends by token and by length, what was learned, trees for the next step
    launch   schedule the next step and send it off
    finish   text, stop strings and outputs; an executor may compute the next step meanwhile

A stop string is thus found when its sequence takes part in the next step already; what that brings
is dropped. Single-threaded; `AsyncEngine` runs it off the event loop.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass

from torch import Tensor

from server.config import EngineConfig
from server.core.completion import Completion, join_outputs
from server.core.request import Request, RequestOutput
from server.core.sequence import Sequence, request_seed
from server.core.step import Outcome, Step, verified
from server.core.text import TextStream
from server.engine.build import EngineParts, build_parts
from server.engine.commit import commit
from server.engine.counters import EngineCounters
from server.engine.output import Emission, emit, request_output
from server.engine.scheduler import Scheduler
from server.engine.step_trace import StepTrace
from server.executor.executor import Flight, Landing
from server.sampling.acceptance import choose_rule
from server.sampling.processors import make_processors

# Gets a request's tokens, and the base model's hidden states of all of them but the last.
OnHidden = Callable[[Seq[int], Tensor], None]


@dataclass(frozen=True, slots=True)
class _Airborne:
    """A step under way."""

    step: Step
    flight: Flight


class Engine:
    """Continuous batching over draft trees.

    Args:
        parts: What the engine is assembled from; its cache has room for hidden states if
            `on_hidden` is given.
        on_hidden: Called at the end of each request all of whose hidden states are computed.

    Attributes:
        counters: Totals for metrics and benches.
        trace: Where the time goes.
    """

    def __init__(self, parts: EngineParts, on_hidden: OnHidden | None = None) -> None:
        self.config = parts.config
        self.loaded = parts.loaded
        self.tokenizer = parts.loaded.tokenizer
        self.limits = parts.limits
        self.heads_name = parts.heads_name
        self.is_compiled = parts.is_compiled
        self.speculator = parts.speculator
        self.executor = parts.executor
        self.blocks = parts.blocks
        self.counters = EngineCounters()
        self.trace = StepTrace()
        self._on_hidden = on_hidden
        self._scheduler = Scheduler(parts.config, parts.blocks, parts.speculator, self._admit)
        self._sequences: dict[str, Sequence] = {}
        self._airborne: _Airborne | None = None

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

    def limit_prompts(self, num_tokens: int | None) -> None:
        """Let further steps compute at most so many prompt tokens; None lifts the limit.

        For measurements that need chunks of certain sizes.
        """
        self._scheduler.prompt_limit = num_tokens

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: If it can never run on this server.
        """
        self.limits.check(request)
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id!r} is already in flight")
        sampling, speculation = request.sampling, request.speculation
        max_nodes = min(speculation.max_nodes or self.config.max_nodes, self.config.max_nodes)
        sources = self.speculator.sources_of(speculation.method) if max_nodes > 1 else ()
        detokenizer = self.tokenizer.detokenizer(request.prompt_token_ids)
        sequence = Sequence(
            request=request,
            text=TextStream(detokenizer, sampling.stop),
            seed=request_seed(request),
            acceptance=choose_rule(sampling, speculation, self.config.acceptance),
            drafts_allowed=max_nodes if sources else 1,
            end_ids=frozenset() if sampling.ignore_eos else self.loaded.eos_token_ids,
            max_len=self.limits.max_model_len,
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

    def step(self, admit: Callable[[], None] | None = None) -> list[RequestOutput]:
        """Land a step, commit it, launch the next one and finish the first.

        Args:
            admit: Called before the launch: requests that are added there take part in it, and
                those that are aborted do not.

        Returns:
            One output for each request that got tokens.
        """
        landing = self._land()
        outcomes, emissions = self._commit(landing)
        if admit is not None:
            admit()
        self._launch()
        return self._finish(outcomes, emissions)

    def generate(self, requests: Seq[Request]) -> list[Completion]:
        """Run requests to their end, together; in the order given.

        Raises:
            InvalidRequestError: If one of them can never run; then none does.
        """
        added: list[Request] = []
        try:
            for request in requests:
                self.add_request(request)
                added.append(request)
        except BaseException:
            for request in added:
                self.abort(request.request_id)
            raise
        pieces: dict[str, list[RequestOutput]] = {r.request_id: [] for r in requests}
        while self.has_unfinished:
            for output in self.step():
                pieces[output.request_id].append(output)
        return [join_outputs(pieces[request.request_id]) for request in requests]

    def _admit(self, sequence: Sequence) -> None:
        """Build what a sequence needs once it runs; queued ones need nothing."""
        if not sequence.is_prepared:
            sequence.is_prepared = True
            sequence.processors = make_processors(
                sequence.request, self.loaded.vocab_size, self.loaded.device
            )
            self.speculator.prepare(sequence)
        self.speculator.admit(sequence)

    def _end(self, sequence: Sequence) -> None:
        sequence.is_ended = True
        count = len(sequence.token_ids) - 1
        if self._on_hidden is not None and sequence.num_computed_tokens == count:
            hidden_XD = self.executor.hidden_states(sequence.block_table, count)
            self._on_hidden(sequence.token_ids, hidden_XD)
        self._scheduler.finish(sequence)
        del self._sequences[sequence.request.request_id]

    def _launch(self) -> None:
        """Send the next step off, unless there is nothing to do."""
        self._airborne = None
        self.trace.start()
        entries = self._scheduler.schedule()
        self.trace.stop("schedule")
        if entries:
            step = Step(tuple(entries), self.speculator.asks(entries))
            self._airborne = _Airborne(step, self.executor.launch(step))
        self.trace.stop("launch")

    def _land(self) -> tuple[Step, Landing] | None:
        """Wait for the step under way; None if there is nothing to do.

        A step that nobody waits for any more is left where it is.
        """
        airborne = self._airborne
        if airborne is None or all(entry.sequence.is_ended for entry in airborne.step.entries):
            self._launch()
            airborne = self._airborne
        if airborne is None:
            return None
        self._airborne = None
        landing = airborne.flight.land()
        self.trace.note_landing(airborne.step, landing)
        return airborne.step, landing

    def _commit(
        self, landed: tuple[Step, Landing] | None
    ) -> tuple[list[Outcome], dict[str, Emission]]:
        """Commit what landed; sequences that end by it leave at once.

        Returns:
            What became of the sequences that are still there, and the emissions of those that end.
        """
        if landed is None:
            return [], {}
        step, landing = landed
        outcomes = [
            commit(entry, one)
            for entry, one in zip(step.entries, landing.entries, strict=True)
            if not entry.sequence.is_ended
        ]
        for outcome in outcomes:
            self._scheduler.note_computed(outcome.entry.sequence)
        self.speculator.learn(outcomes, landing)
        self.trace.stop("commit")
        self.speculator.propose(outcomes)
        self.trace.stop("propose")
        emissions = {}
        for outcome in outcomes:
            if outcome.finish_reason is not None:
                sequence = outcome.entry.sequence
                emissions[sequence.request.request_id] = emit(outcome)
                self._end(sequence)
        self.counters.count_step(outcomes)
        self.counters.num_preemptions = self._scheduler.num_preemptions
        self.trace.stop("commit")
        return outcomes, emissions

    def _finish(
        self, outcomes: Seq[Outcome], emissions: dict[str, Emission]
    ) -> list[RequestOutput]:
        """Make the outputs of a step; sequences that a stop string ends leave."""
        outputs = []
        for outcome in verified(outcomes):
            sequence = outcome.entry.sequence
            emission = emissions.get(sequence.request.request_id)
            if emission is None:
                if sequence.is_ended:
                    continue  # aborted since the step landed
                emission = emit(outcome)
                if emission.finish_reason is not None:
                    self._end(sequence)
            self.counters.count_emission(sequence, emission)
            outputs.append(request_output(outcome, emission))
        self.trace.stop("finish")
        return outputs
