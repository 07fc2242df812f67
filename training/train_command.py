"""`train`: distilled answers in, a heads checkpoint out; killed and started again, it goes on.

The output directory first holds a run (state and metrics), then the heads with the profile that was
measured on the held-out conversations.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from heads.checkpoint import CONFIG_FILE, save_heads
from heads.kinds import AnyHeads
from heads.medusa import MedusaConfig, MedusaHeads
from server.model.loading import LoadedModel
from training.answers import load_answers
from training.base_model import load_base
from training.config_file import save_config
from training.dataset import Corpus, frequent_tokens, split
from training.drafts import Drafts, MedusaDrafts, MTPDrafts
from training.errors import DataError, RunError
from training.examples import Examples, ExampleSource
from training.hidden_states import HiddenStateEncoder
from training.losses import MedusaObjective, medusa_groups
from training.metrics import METRICS_FILE
from training.mtp_objective import MTPObjective
from training.mtp_source import EncodedBatch, EncodedSource
from training.mtp_start import FreshMTP, fresh_mtp
from training.objective import ParameterGroup, Trainable
from training.options import TrainOptions
from training.processes import Processes
from training.progress import note, progress_bar
from training.report import ACCEPTANCE_FILE, Measurement, measure, save_acceptance, summary
from training.run_state import STATE_FILE
from training.trainer import StepMetrics, Trainer

# What may change while a run is interrupted. The data is compared by content, not by name.
_FREE_OPTIONS = frozenset(
    {
        "data",
        "output",
        "overwrite",
        "device",
        "num_threads",
        "log_interval",
        "save_interval",
        "gradient_accumulation",
    }
)
# Options that only one method has.
_METHOD_OPTIONS = {
    "medusa": ("num_heads", "num_blocks", "root_conditioned", "root_rate_factor", "batch_size"),
    "mtp": ("num_depths", "batch_tokens"),
}


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What is trained for, and on what."""

    options: TrainOptions
    loaded: LoadedModel
    encoder: HiddenStateEncoder
    train: Corpus
    data_sha256: str
    processes: Processes

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the heads' matrix products."""
        precision = self.options.mixed_precision
        if precision == "auto":
            return torch.float32 if self.encoder.dtype == torch.float32 else torch.bfloat16
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def run(options: TrainOptions) -> dict[str, Any] | None:
    """Train heads, measure them and write the checkpoint.

    Returns:
        The result to print; None on all processes but the first.

    Raises:
        DataError: If the data is broken or of another base model.
        RunError: If `output` holds heads, or a run with other options, or an option does not go
            with the method.
        DivergedError: If the loss is no longer a number.
        ModelError: If the base model cannot be loaded or trained for.
    """
    _check_options(options)
    processes = Processes(options.device, is_scaled=options.mixed_precision == "fp16")
    _prepare_output(options, processes)
    loaded = load_base(options, device=processes.device)
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
    task = _Task(
        options, loaded, HiddenStateEncoder(loaded), parts.train, answers.sha256, processes
    )
    heads: AnyHeads
    drafts: Drafts
    if options.method == "mtp":
        fresh = fresh_mtp(options, loaded, parts.train)
        heads = fresh.module
        trainer = _trained(task, _mtp(task, fresh))
        drafts = MTPDrafts(task.encoder, fresh.module, fresh.block, options.num_depths)
    else:
        heads = _fresh_medusa(options, loaded, parts.train)
        trainer = _trained(task, _medusa(task, heads))
        drafts = MedusaDrafts(task.encoder, heads)
    processes.end()
    if not processes.is_main:
        return None
    found = _measured(parts.held_out, drafts)
    save_heads(
        options.output,
        heads,
        loaded.fingerprint,
        options.model,
        None if found is None else found.result.profile,
    )
    if found is not None:
        save_acceptance(options.output, found, options.model, answers.sha256)
    trainer.discard_state()
    evaluation = {} if found is None else summary(found.result)
    return {"output": str(options.output), "num_steps": trainer.num_steps, **evaluation}


def _check_options(options: TrainOptions) -> None:
    default = {item.name: item.default for item in fields(TrainOptions)}
    for method, names in _METHOD_OPTIONS.items():
        for name in names:
            value = getattr(options, name)
            if method != options.method and value != default[name]:
                raise RunError(
                    f"{name} is {value}, which method {options.method} has no use for; leave it "
                    f"out or give --method {method}"
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
    processes.wait()
    is_done = (directory / CONFIG_FILE).exists() and not (directory / STATE_FILE).exists()
    if is_done:
        raise RunError(f"{directory} holds heads already; give another --output or --overwrite")
    directory.mkdir(parents=True, exist_ok=True)


def _fresh_medusa(options: TrainOptions, loaded: LoadedModel, train: Corpus) -> MedusaHeads:
    """Untrained Medusa heads with float32 weights; the draft vocabulary comes from the answers."""
    draft_vocab_size = min(options.draft_vocab_size, loaded.vocab_size) or None
    config = MedusaConfig(
        hidden_size=loaded.hidden_size,
        vocab_size=loaded.vocab_size,
        num_heads=options.num_heads,
        num_blocks=options.num_blocks,
        root_conditioned=options.root_conditioned,
        draft_vocab_size=draft_vocab_size,
    )
    ids_U = None
    if draft_vocab_size is not None:
        ids_U = frequent_tokens(train.documents, loaded.vocab_size, draft_vocab_size)
    heads = MedusaHeads(config, loaded.unembedding(), loaded.input_embedding(), ids_U)
    return heads.float()


def _medusa(task: _Task, heads: MedusaHeads) -> Trainable[Examples]:
    options = task.options
    source = ExampleSource(task.train, task.encoder, options.num_heads, options.batch_plan)
    _fill_cache(task, source)
    groups = medusa_groups(heads, options.root_rate_factor)
    return Trainable(heads, groups, source, MedusaObjective(heads, task.compute_dtype))


def _mtp(task: _Task, fresh: FreshMTP) -> Trainable[EncodedBatch]:
    source = EncodedSource(task.train, task.encoder, task.options.token_plan)
    _fill_cache(task, source)
    module, num_depths = fresh.module, task.options.num_depths
    return Trainable(
        module,
        (ParameterGroup(tuple(module.parameters())),),
        source,
        MTPObjective(module, fresh.block, num_depths, task.compute_dtype),
    )


def _fill_cache(task: _Task, source: ExampleSource | EncodedSource) -> None:
    if task.options.cache:
        with progress_bar("hidden states", len(task.train.documents)) as bar:
            source.fill_cache(bar.advance)


def _trained(task: _Task, trainable: Trainable[Any]) -> Trainer[Any]:
    """Train to the end, from where an earlier process was if there was one."""
    options = task.options
    # Said in full, because the default hangs on the method.
    options = replace(options, learning_rate=options.peak_learning_rate)
    kept = {k: v for k, v in asdict(options).items() if k not in _FREE_OPTIONS}
    kept["data_sha256"] = task.data_sha256
    trainer = Trainer(trainable, options.train_config, options.output, kept, task.processes)
    if trainer.resume():
        note(f"the run in {options.output} goes on after step {trainer.step}")
    if task.processes.is_main:
        save_config(options.output / "train.toml", "train", options)
    with progress_bar("training", trainer.num_steps) as bar:
        bar.advance(trainer.step)

        def show(metrics: StepMetrics) -> None:
            bar.advance()
            bar.show(f"loss {metrics.loss:.3f}, {metrics.examples_per_s:.0f} examples/s")

        trainer.train(show)
    return trainer


def _measured(held_out: Corpus, drafts: Drafts) -> Measurement | None:
    """Measure the heads; None if nothing was held out."""
    if held_out.num_examples == 0:
        note("nothing was held out: the heads get no acceptance profile; run evaluate")
        return None
    return measure(held_out, drafts)
