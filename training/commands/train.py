"""`train`: distilled answers in, a heads checkpoint out; killed and started again, it goes on.

The output directory first holds a run (state and metrics), then the heads with the profile that was
measured on the held-out conversations.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from heads.checkpoint import CONFIG_FILE, WEIGHTS_FILE, save_heads
from heads.kinds import AnyHeads
from heads.medusa import MedusaHeads
from server.errors import ModelError
from training.commands.config_file import save_config
from training.commands.options import TrainOptions
from training.commands.train_arguments import TrainMethod
from training.data.answers import load_answers
from training.data.dataset import Corpus, split
from training.data.jsonl import file_sha256
from training.errors import DataError, RunError
from training.loop.metrics import METRICS_FILE
from training.loop.objective import Trainable
from training.loop.processes import Processes
from training.loop.run_state import STATE_FILE
from training.loop.sharding import load_base_for
from training.loop.tensorboard import summary_writer
from training.loop.trainer import StepMetrics, Trainer
from training.loop.usage import Usage
from training.measure.acceptance import (
    ACCEPTANCE_FILE,
    Measurement,
    measure,
    save_acceptance,
    summary,
)
from training.measure.validation import validation
from training.methods.drafts import Drafts, MedusaDrafts, MTPDrafts
from training.methods.lora import AdaptedBase
from training.methods.medusa2_start import adapted_base, medusa2_trainable, perplexities
from training.methods.mtp_start import fresh_mtp
from training.methods.starting_heads import starting_heads
from training.methods.task import Task
from training.methods.trainables import hidden_states, medusa_trainable, mtp_trainable
from training.progress import note, progress_bar
from training.states.hidden_states import HiddenStateEncoder, HiddenStates

# What may change while a run is interrupted. The data is compared by content, not by name.
_FREE_OPTIONS = frozenset(
    {
        "data",
        "output",
        "overwrite",
        "init_heads",
        "device",
        "num_threads",
        "log_interval",
        "tensorboard",
        "save_interval",
        "gradient_accumulation",
        "sharding",
        "hidden_cache",
    }
)
# Inside of `output`.
WARMUP_DIR = "warmup"
# Options that not all methods have.
_METHOD_OPTIONS: Mapping[tuple[TrainMethod, ...], tuple[str, ...]] = {
    ("medusa", "medusa2"): (
        "init_heads",
        "num_heads",
        "num_blocks",
        "root_conditioned",
        "root_rate_factor",
        "batch_size",
    ),
    ("mtp",): ("num_depths", "batch_tokens"),
    ("medusa", "mtp"): ("kl_weight", "hidden_cache", "hidden_cache_dtype"),
    ("medusa2",): (
        "warmup_epochs",
        "lora_rank",
        "lora_targets",
        "lora_learning_rate",
        "divergence_weight",
    ),
}


def run(options: TrainOptions) -> dict[str, Any] | None:
    """Train heads, measure them and write the checkpoint.

    Returns:
        The result to print; None on all processes but the first.

    Raises:
        DataError: If the data is broken or of another base model.
        RunError: If `output` holds heads, or a run with other options, or an option does not go
            with the method or needs what is not installed.
        DivergedError: If the loss is no longer a number.
        ModelError: If the base model cannot be loaded or trained for.
    """
    _check_options(options)
    processes = Processes(options.device, is_scaled=options.mixed_precision == "fp16")
    _prepare_output(options, processes)
    loaded = load_base_for(options, processes)
    answers = load_answers(options.data, loaded, options.limit)
    parts = split(answers.corpus, options.held_out)
    if parts.train.num_examples == 0:
        raise DataError(
            "every answer is held out, which leaves nothing to train on; give more data or a "
            f"smaller --held-out than {options.held_out:g}"
        )
    note(
        f"{parts.train.num_answer_tokens} answer tokens to train on, "
        f"{parts.held_out.num_answer_tokens} held out"
    )
    usage, encoder = Usage(), HiddenStateEncoder(loaded)
    _check_logits(options, encoder)
    train, held_out, sha256 = parts.train, parts.held_out, answers.sha256
    task = Task(options, loaded, encoder, encoder, train, held_out, sha256, processes, usage)
    task = replace(task, states=hidden_states(task, answers.corpus))
    learnt = _learnt(task)
    # Who holds a part of the base has to run it with the others.
    is_measuring = processes.is_main or options.sharding == "fsdp"
    with usage.stage("measuring"):
        found = _measured(parts.held_out, learnt.drafts) if is_measuring else None
    processes.end()
    if not processes.is_main:
        return None
    save_heads(
        options.output,
        learnt.heads,
        loaded.fingerprint,
        options.model,
        None if found is None else found.result.profile,
        adapter=None if learnt.base is None else learnt.base.files(),
    )
    if found is not None:
        save_acceptance(options.output, found, options.model, answers.sha256)
    learnt.trainer.discard_state()
    evaluation = {} if found is None else summary(found.result)
    if found is not None and learnt.base is not None:
        evaluation["perplexity"] = perplexities(task, learnt.base, parts.held_out)
    return {
        "output": str(options.output),
        "num_steps": learnt.trainer.step,
        **evaluation,
        **usage.summary(parts.train, processes.device),
    }


def _check_options(options: TrainOptions) -> None:
    default = {item.name: item.default for item in fields(TrainOptions)}
    for methods, names in _METHOD_OPTIONS.items():
        for name in names:
            value = getattr(options, name)
            if options.method not in methods and value != default[name]:
                raise RunError(
                    f"{name} is {value}, which method {options.method} has no use for; leave it "
                    f"out or give --method {' or '.join(methods)}"
                )
    if options.method == "medusa2" and options.learning_rate == 0.0:
        raise RunError("learning_rate is 0.0; for medusa2 give the heads a rate above 0")
    if options.tensorboard is not None:
        summary_writer()
    has_interval = options.validation_interval != default["validation_interval"]
    if has_interval and options.early_stopping == 0:
        raise RunError(
            f"validation_interval is {options.validation_interval}, but without early_stopping "
            "nothing is measured on the way; give --early-stopping too or leave it out"
        )
    if options.init_heads is not None and options.warmup_epochs != default["warmup_epochs"]:
        raise RunError(
            f"warmup_epochs is {options.warmup_epochs}, but heads to begin with get no warm-up; "
            "leave out one of --warmup-epochs and --init-heads"
        )


def _check_logits(options: TrainOptions, encoder: HiddenStateEncoder) -> None:
    if options.kl_weight > 0.0 and not encoder.has_plain_logits:
        raise ModelError(
            f"kl_weight is {options.kl_weight:g}, but model {options.model!r} scales, caps or "
            "shifts its logits, so that its distribution is not known; leave it out"
        )


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
    is_done = (directory / CONFIG_FILE).exists() and not (directory / STATE_FILE).exists()
    if is_done:
        raise RunError(f"{directory} holds heads already; give another --output or --overwrite")
    directory.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Learnt:
    """Heads after their run, and what they draft; with an adapter their base.

    Attributes:
        base: None if it was frozen.
    """

    heads: AnyHeads
    drafts: Drafts
    trainer: Trainer[Any]
    base: AdaptedBase | None = None


def _learnt(task: Task) -> _Learnt:
    """Train by the method that the options name."""
    options, base = task.options, None
    drafts_of: Callable[[HiddenStates], Drafts]
    trainable: Trainable[Any]
    if options.method == "mtp":
        fresh = fresh_mtp(options, task.loaded, task.train)
        module, block = fresh.module, fresh.block
        drafts_of = partial(MTPDrafts, module=module, block=block, num_depths=options.num_depths)
        trainer = _trained(task, mtp_trainable(task, fresh), drafts_of)
        return _Learnt(module, drafts_of(task.states), trainer)
    heads = starting_heads(options, task.loaded, task.train)
    if options.method == "medusa2":
        with task.usage.stage("warmup"):
            heads = _warmed_up(task, heads)
        base = adapted_base(task)
        trainable = medusa2_trainable(task, heads, base)
    else:
        trainable = medusa_trainable(task, heads)
    drafts_of = partial(MedusaDrafts, heads=heads)
    trainer = _trained(task, trainable, drafts_of)
    return _Learnt(heads, drafts_of(task.states), trainer, base)


def _warmed_up(task: Task, heads: MedusaHeads) -> MedusaHeads:
    """Heads that were trained alone first, in a run and a checkpoint of their own.

    Those that a checkpoint brought are returned as they are.
    """
    options = task.options
    if options.init_heads is not None:
        return heads
    directory = options.output / WARMUP_DIR
    is_done = (directory / CONFIG_FILE).exists() and not (directory / STATE_FILE).exists()
    if not is_done:
        note(f"warm-up: the heads alone, {options.warmup_epochs} epochs")
        directory.mkdir(exist_ok=True)
        alone = replace(
            options,
            method="medusa",
            output=directory,
            epochs=options.warmup_epochs,
            early_stopping=0,
            tensorboard=None if options.tensorboard is None else options.tensorboard / WARMUP_DIR,
        )
        warmup = replace(task, options=alone, usage=Usage())
        drafts_of = partial(MedusaDrafts, heads=heads)
        trainer = _trained(warmup, medusa_trainable(warmup, heads), drafts_of)
        if task.processes.is_main:
            name, fingerprint = options.model, task.loaded.fingerprint
            save_heads(directory, heads, fingerprint, name, None, dtype=torch.float32)
        trainer.discard_state()
    task.processes.wait()
    return starting_heads(replace(options, init_heads=directory), task.loaded, task.train)


def _trained(
    task: Task, trainable: Trainable[Any], drafts_of: Callable[[HiddenStates], Drafts]
) -> Trainer[Any]:
    """Train to the end, from where an earlier process was if there was one."""
    options = task.options
    # Said in full, because the default hangs on the method.
    options = replace(options, learning_rate=options.peak_learning_rate)
    kept = {k: v for k, v in asdict(options).items() if k not in _FREE_OPTIONS}
    kept["data_sha256"] = task.data_sha256
    if options.init_heads is not None:
        kept["init_heads_sha256"] = file_sha256(options.init_heads / WEIGHTS_FILE)
    validated = validation(task, trainable.module, drafts_of)
    trainer = Trainer(
        trainable, options.train_config, options.output, kept, task.processes, validated
    )
    if trainer.resume():
        note(f"the run in {options.output} goes on after step {trainer.step}")
    if task.processes.is_main:
        save_config(options.output / "train.toml", "train", options)
    num_before = trainer.num_examples
    with task.usage.stage("steps"), progress_bar("training", trainer.num_steps) as bar:
        bar.advance(trainer.step)

        def show(metrics: StepMetrics) -> None:
            bar.advance()
            bar.show(f"loss {metrics.loss:.3f}, {metrics.examples_per_s:.0f} examples/s")

        trainer.train(show)
    if validated.best is not None:
        best = validated.best
        note(f"best after step {best.step} of {trainer.step}: {best.length:.4f} tokens per step")
    task.usage.add_examples(trainer.num_examples - num_before)
    return trainer


def _measured(held_out: Corpus, drafts: Drafts) -> Measurement | None:
    """Measure the heads; None if nothing was held out."""
    if held_out.num_examples == 0:
        note("nothing was held out: the heads get no acceptance profile; run evaluate")
        return None
    return measure(held_out, drafts)
