"""`train`: distilled answers in, a heads checkpoint out; killed and started again, it goes on.

The output directory first holds a run (state and metrics), then the heads with the profile that was
measured on the held-out conversations.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heads.checkpoint import CONFIG_FILE, save_heads
from server.cli.console import progress_bar
from server.cli.options import Choice, Command, Settings
from server.model.loading import LoadedModel
from training.commands.common import save_options
from training.commands.train_options import TrainOptions
from training.data.answers import load_answers
from training.data.dataset import Corpus, Split, split
from training.errors import DataError, RunError
from training.loop.early_stopping import EarlyStopping, NoValidation, StoppingPlan, Validation
from training.loop.metrics import METRICS_FILE
from training.loop.processes import Processes
from training.loop.run_state import STATE_FILE, RunRecord
from training.loop.sharding import check_processes, spread
from training.loop.trackers import Tracking
from training.loop.trainer import StepMetrics, TrainConfig, Trainer
from training.loop.usage import Usage
from training.measure.acceptance import (
    ACCEPTANCE_FILE,
    Measurement,
    measure,
    save_acceptance,
    summary,
)
from training.measure.perplexity import comparison, perplexity
from training.measure.validation import acceptance_length, sample
from training.methods.method import WARMUP_DIR, Method, Run, Task
from training.methods.table import METHODS
from training.resuming import kept_options
from training.states.hidden_states import HiddenStateEncoder, KeptStates

_LOGGER = logging.getLogger("euryale.training")


def run(options: TrainOptions, config: TrainConfig, method: Method) -> dict[str, Any] | None:
    """Train heads, measure them and write the checkpoint.

    Returns:
        The result to print; None on all processes but the first.

    Raises:
        DataError: If the data is broken or of another base model.
        RunError: If `output` holds heads, or a run with other options, or options do not go
            together or need what is not installed.
        DivergedError: If the loss is no longer a number.
        ModelError: If the base model cannot be loaded or trained for.
    """
    options.check()
    tracking = options.tracking
    if options.sharding == "fsdp":
        method.check_sharded()
    processes = Processes(options.device, is_scaled=options.mixed_precision == "fp16")
    _prepare_output(options, processes)
    loaded = _load_base(options, method, processes)
    answers = load_answers(options.data, loaded, options.limit)
    parts = _split(answers.corpus, options.held_out)
    encoder = HiddenStateEncoder(loaded)
    session = Session(options, config, method, tracking, parts.held_out, answers.sha256)
    task = Task(
        loaded=loaded,
        encoder=encoder,
        answers=answers.corpus,
        train=parts.train,
        compute_dtype=options.compute_dtype(encoder.dtype),
        is_cached=options.cache,
        seed=options.seed,
        processes=processes,
        usage=Usage(),
        run_first=session.train_first,
    )
    prepared = method.prepare(task)
    trainer = session.train(prepared, task)
    # Who holds a part of the base has to run it with the others.
    is_measuring = processes.is_main or options.sharding == "fsdp"
    with task.usage.stage("measuring"):
        found = _measured(parts.held_out, prepared) if is_measuring else None
    processes.end()
    if not processes.is_main:
        return None
    result = _saved(session, prepared, task, found)
    trainer.discard_state()
    return {
        "output": str(options.output),
        "num_steps": trainer.step,
        **result,
        **task.usage.summary(parts.train, processes.device),
    }


def _prepare_output(options: TrainOptions, processes: Processes) -> None:
    """Make room for a run.

    Raises:
        RunError: If the directory holds finished heads and nothing allows to drop them.
    """
    directory = options.output
    if options.overwrite and processes.is_main:
        for name in (CONFIG_FILE, STATE_FILE, METRICS_FILE, ACCEPTANCE_FILE):
            (directory / name).unlink(missing_ok=True)
            (directory / WARMUP_DIR / name).unlink(missing_ok=True)
    processes.wait()
    if _is_done(directory):
        raise RunError(f"{directory} holds heads already; give another --output or --overwrite")
    directory.mkdir(parents=True, exist_ok=True)


def _is_done(directory: Path) -> bool:
    return (directory / CONFIG_FILE).exists() and not (directory / STATE_FILE).exists()


def _load_base(options: TrainOptions, method: Method, processes: Processes) -> LoadedModel:
    """Load the base model whole, or a part of every layer."""
    if options.sharding == "none":
        return options.load(is_packed=method.is_base_frozen, device=str(processes.device))
    check_processes(processes)
    is_default_on_cuda = options.dtype == "auto" and processes.device.type == "cuda"
    dtype = "bfloat16" if is_default_on_cuda else options.dtype
    return spread(options.load(is_packed=False, device="cpu", dtype=dtype), processes)


def _split(corpus: Corpus, held_out: float) -> Split:
    parts = split(corpus, held_out)
    if parts.train.num_examples == 0:
        raise DataError(
            "every answer is held out, which leaves nothing to train on; give more data or a "
            f"smaller --held-out than {held_out:g}"
        )
    _LOGGER.info(
        "%d answer tokens to train on, %d held out",
        parts.train.num_answer_tokens,
        parts.held_out.num_answer_tokens,
    )
    return parts


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """Trains by one method in one directory, from where an earlier process was if there was one.

    Attributes:
        options: Options that every method has; `output` is the directory.
        config: The training loop.
        method: What is trained.
        tracking: Trackers that get the metrics.
        held_out: Answers that are not trained on.
        data_sha256: Digest of all answers.
    """

    options: TrainOptions
    config: TrainConfig
    method: Method
    tracking: Tracking
    held_out: Corpus
    data_sha256: str

    def train(self, prepared: Run[Any], task: Task) -> Trainer[Any]:
        """Train to the end.

        Raises:
            RunError: If the directory holds a run with other options, or cannot be written.
            DivergedError: If the loss is no longer a number.
        """
        validation = self._validation(prepared, task)
        kept = {
            **kept_options(self.options, self.config, self.method),
            **prepared.digests,
            "method": self.method.name,
            # In full, because its default may depend on the method.
            "learning_rate": prepared.trainable.learning_rate,
            "data_sha256": self.data_sha256,
        }
        record = RunRecord(self.options.output, kept, self.tracking)
        trainer = Trainer(prepared.trainable, self.config, record, task.processes, validation)
        if trainer.resume():
            _LOGGER.info("the run in %s goes on after step %d", record.directory, trainer.step)
        if task.processes.is_main:
            arguments = {"options": self.options, "config": self.config, "method": self.method}
            save_options(record.directory / "train.toml", TRAIN, arguments)
        num_before = trainer.num_examples
        with task.usage.stage("steps"), progress_bar("training", trainer.num_steps) as bar:
            bar.advance(trainer.step)

            def show(metrics: StepMetrics) -> None:
                bar.advance()
                bar.show(f"loss {metrics.loss:.3f}, {metrics.examples_per_s:.0f} examples/s")

            trainer.train(show)
        best = validation.best
        if best is not None:
            _LOGGER.info(
                "best after step %d of %d: %.4f tokens per step",
                *(best.step, trainer.step, best.length),
            )
        task.usage.add_examples(trainer.num_examples - num_before)
        return trainer

    def train_first(self, task: Task, method: Method, epochs: int) -> Path:
        """Train heads by another method; see `Task.train_first`."""
        directory = self.options.output / WARMUP_DIR
        if not _is_done(directory):
            _LOGGER.info("warm-up: the heads alone, %d epochs", epochs)
            directory.mkdir(exist_ok=True)
            first = replace(
                self,
                options=replace(self.options, output=directory, early_stopping=0),
                config=replace(self.config, epochs=epochs),
                method=method,
                tracking=self.tracking.part(WARMUP_DIR),
            )
            prepared = method.prepare(task)
            trainer = first.train(prepared, task)
            if task.processes.is_main:
                name, fingerprint = self.options.model, task.loaded.fingerprint
                save_heads(directory, prepared.heads, fingerprint, name, None, dtype=torch.float32)
            trainer.discard_state()
        task.processes.wait()
        return directory

    def _validation(self, prepared: Run[Any], task: Task) -> Validation:
        patience = self.options.early_stopping
        if patience == 0:
            return NoValidation()
        corpus = sample(self.held_out)
        if corpus.num_examples == 0:
            raise DataError(
                f"early_stopping is {patience}, but nothing is held out to measure on; give a "
                f"larger --held-out than {self.options.held_out:g}, or leave --early-stopping out"
            )
        # An adapted base changes from step to step.
        is_fixed = prepared.adapted is None
        drafts = prepared.drafts_of(KeptStates(prepared.states) if is_fixed else prepared.states)

        def measured() -> float:
            with task.usage.stage("validation"):
                return acceptance_length(corpus, drafts)

        plan = StoppingPlan(self.options.validation_interval, patience)
        return EarlyStopping(prepared.trainable.module, measured, plan, task.processes)


def _measured(held_out: Corpus, prepared: Run[Any]) -> Measurement | None:
    """Measure the heads; None if nothing was held out."""
    if held_out.num_examples == 0:
        _LOGGER.info("nothing was held out: the heads get no acceptance profile; run evaluate")
        return None
    return measure(held_out, prepared.drafts_of(prepared.states))


def _saved(
    session: Session, prepared: Run[Any], task: Task, found: Measurement | None
) -> dict[str, Any]:
    """Write the checkpoint; returns what is printed of the measurement."""
    directory, name, base = session.options.output, session.options.model, prepared.adapted
    save_heads(
        directory,
        prepared.heads,
        task.loaded.fingerprint,
        name,
        None if found is None else found.result.profile,
        adapter=None if base is None else base.files(),
    )
    if found is None:
        return {}
    save_acceptance(directory, found, name, session.data_sha256)
    printed = summary(found.result)
    if base is not None:
        measured = (session.held_out, task.encoder, task.loaded.unembedding())
        with base.without():
            plain = perplexity(*measured)
        printed["perplexity"] = comparison(plain, perplexity(*measured))
    return printed


TRAIN = Command(
    "train",
    "Train draft heads on distilled or other answers.",
    run,
    {
        "options": Settings(TrainOptions),
        "method": Choice("method", "What is trained.", METHODS, default="medusa"),
        "config": Settings(TrainConfig),
    },
)
