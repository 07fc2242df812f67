"""`train`: distilled answers in, a heads checkpoint out; killed and started again, it goes on.

The output directory first holds a run (state and metrics), then the heads with the profile that was
measured on the held-out conversations.
"""

from dataclasses import asdict
from typing import Any

import torch

from heads.checkpoint import CONFIG_FILE, save_heads
from heads.medusa import MedusaConfig, MedusaHeads
from server.model.loading import LoadedModel
from training.answers import load_answers
from training.base_model import load_base
from training.config_file import save_config
from training.dataset import Corpus, frequent_tokens, split
from training.errors import DataError, RunError
from training.examples import Examples, ExampleSource
from training.hidden_states import HiddenStateEncoder
from training.losses import MedusaObjective, medusa_groups
from training.metrics import METRICS_FILE
from training.objective import Trainable
from training.options import MixedPrecision, TrainOptions
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


def run(options: TrainOptions) -> dict[str, Any] | None:
    """Train heads, measure them and write the checkpoint.

    Returns:
        The result to print; None on all processes but the first.

    Raises:
        DataError: If the data is broken or of another base model.
        RunError: If `output` holds heads, or a run with other options.
        DivergedError: If the loss is no longer a number.
        ModelError: If the base model cannot be loaded or trained for.
    """
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
    encoder = HiddenStateEncoder(loaded)
    heads = _fresh_heads(options, loaded, parts.train)
    trainer = _trained(options, heads, encoder, parts.train, answers.sha256, processes)
    processes.end()
    if not processes.is_main:
        return None
    found = _measured(parts.held_out, encoder, heads)
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


def _fresh_heads(options: TrainOptions, loaded: LoadedModel, train: Corpus) -> MedusaHeads:
    """Untrained heads with float32 weights; the draft vocabulary comes from the answers."""
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


def _trained(
    options: TrainOptions,
    heads: MedusaHeads,
    encoder: HiddenStateEncoder,
    train: Corpus,
    data_sha256: str,
    processes: Processes,
) -> Trainer[Examples]:
    source = ExampleSource(train, encoder, options.num_heads, options.batch_plan)
    if options.cache:
        with progress_bar("hidden states", len(train.documents)) as bar:
            source.fill_cache(bar.advance)
    kept = {k: v for k, v in asdict(options).items() if k not in _FREE_OPTIONS}
    kept["data_sha256"] = data_sha256
    compute_dtype = _compute_dtype(options.mixed_precision, encoder.dtype)
    trainable = Trainable(
        heads,
        medusa_groups(heads, options.root_rate_factor),
        source,
        MedusaObjective(heads, compute_dtype),
    )
    trainer = Trainer(trainable, options.train_config, options.output, kept, processes)
    if trainer.resume():
        note(f"the run in {options.output} goes on after step {trainer.step}")
    if processes.is_main:
        save_config(options.output / "train.toml", "train", options)
    with progress_bar("training", trainer.num_steps) as bar:
        bar.advance(trainer.step)

        def show(metrics: StepMetrics) -> None:
            bar.advance()
            bar.show(f"loss {metrics.loss:.3f}, {metrics.examples_per_s:.0f} examples/s")

        trainer.train(show)
    return trainer


def _compute_dtype(precision: MixedPrecision, base: torch.dtype) -> torch.dtype:
    if precision == "auto":
        return torch.float32 if base == torch.float32 else torch.bfloat16
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _measured(
    held_out: Corpus, encoder: HiddenStateEncoder, heads: MedusaHeads
) -> Measurement | None:
    """Measure the heads; None if nothing was held out."""
    if held_out.num_examples == 0:
        note("nothing was held out: the heads get no acceptance profile; run evaluate")
        return None
    return measure(held_out, encoder, heads)
