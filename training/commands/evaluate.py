"""`evaluate`: heads and answers that they were not trained on in, the acceptance profile out."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heads.checkpoint import save_heads
from server.cli.options import Command, Count, Settings
from server.model.draft_heads import DraftHeads, load_draft_heads
from server.model.loading import LoadedModel
from training.commands.common import ModelOptions, save_options
from training.data.answers import load_answers
from training.data.data_source import DataOptions
from training.data.dataset import Corpus
from training.measure.acceptance import Measurement, measure, save_acceptance, summary
from training.measure.perplexity import comparison, perplexity
from training.methods.drafts import drafts_of
from training.states.hidden_cache import HiddenCacheOptions
from training.states.hidden_states import HiddenStateEncoder, HiddenStates

_LOGGER = logging.getLogger("euryale.training")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Heads, answers and the base model.

    Attributes:
        heads: Directory of the heads.
        data: Answers that the heads were not trained on: JSON lines (.gz) or `hf:NAME#SPLIT`;
            repeatable.
        limit: Conversations, from the beginning of the data; not given, all.
        num_ranks: Candidates per depth that the profile covers.
        num_depths: Depths that an MTP module is measured at; not given, as many as its profile has.
        save: Whether the profile is written into the checkpoint.
    """

    heads: Path
    data: DataOptions
    limit: Count | None = None
    num_ranks: Count = 16
    num_depths: Count | None = None
    save: bool = True


def run(options: EvaluateOptions, cache: HiddenCacheOptions) -> dict[str, Any]:
    """Measure heads and save their profile; returns the result to print.

    Raises:
        DataError: If the data is broken, empty or of another base model.
        ConfigError: If the heads cannot be read.
        RunError: If an option does not go with the heads.
        HeadsMismatchError: If the heads belong to another base model.
        ModelError: If the base model cannot be loaded.
    """
    loaded = options.load(options.heads)
    found = load_draft_heads(options.heads, loaded)
    answers = load_answers(options.data, loaded, options.limit)
    encoder = HiddenStateEncoder(loaded)
    states: HiddenStates = cache.open_cache(encoder, loaded) or encoder
    drafts = drafts_of(found, states, options.num_depths)
    measured = measure(answers.corpus, drafts, options.num_ranks)
    if options.save:
        _save(options, found, loaded, measured, answers.sha256)
        save_options(
            options.heads / "evaluate.toml", EVALUATE, {"options": options, "cache": cache}
        )
    printed = summary(measured.result)
    if found.adapter is not None:
        printed["perplexity"] = _perplexities(options, loaded, encoder, answers.corpus)
    return {"heads": str(options.heads), **printed}


def _save(
    options: EvaluateOptions,
    found: DraftHeads,
    loaded: LoadedModel,
    measured: Measurement,
    data_sha256: str,
) -> None:
    save_heads(
        options.heads,
        found.heads,
        loaded.fingerprint,
        found.base_name,
        measured.result.profile,
        adapter=found.adapter,
    )
    save_acceptance(options.heads, measured, found.base_name, data_sha256)


def _perplexities(
    options: EvaluateOptions, loaded: LoadedModel, encoder: HiddenStateEncoder, corpus: Corpus
) -> dict[str, float] | None:
    """Compare the base model with its adapter and without; None if its logits are unusual."""
    if not encoder.has_plain_logits:
        _LOGGER.info(
            "%s scales, caps or shifts its logits: its perplexity is not measured", loaded.name
        )
        return None
    adapted = perplexity(corpus, encoder, loaded.unembedding())
    base = options.load()
    plain = perplexity(corpus, HiddenStateEncoder(base), base.unembedding())
    return comparison(plain, adapted)


EVALUATE = Command(
    "evaluate",
    "Measure heads on answers that they were not trained on.",
    run,
    {"options": Settings(EvaluateOptions), "cache": Settings(HiddenCacheOptions)},
)
