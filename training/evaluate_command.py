"""`evaluate`: heads and answers that they were not trained on in, the acceptance profile out."""

from typing import Any

from heads.checkpoint import save_heads
from heads.medusa import MedusaHeads
from server.model.draft_heads import DraftHeads, load_draft_heads
from server.model.loading import LoadedModel
from training.answers import load_answers
from training.base_model import load_base
from training.config_file import save_config
from training.dataset import Corpus
from training.drafts import Drafts, MedusaDrafts, MTPDrafts
from training.errors import RunError
from training.hidden_cache import open_cache
from training.hidden_states import HiddenStateEncoder, HiddenStates
from training.options import EvaluateOptions
from training.perplexity import comparison, perplexity
from training.progress import note
from training.report import measure, save_acceptance, summary

# Of an MTP module that was never measured.
_DEFAULT_DEPTHS = 4


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Measure heads and save their profile; returns the result to print.

    Raises:
        DataError: If the data is broken, empty or of another base model.
        ConfigError: If the heads cannot be read.
        RunError: If an option does not go with the heads.
        HeadsMismatchError: If the heads belong to another base model.
        ModelError: If the base model cannot be loaded.
    """
    loaded = load_base(options, options.heads)
    found = load_draft_heads(options.heads, loaded)
    answers = load_answers(options.data, loaded, options.limit)
    encoder = HiddenStateEncoder(loaded)
    states: HiddenStates = open_cache(options, encoder, loaded) or encoder
    drafts = _drafts(options, found, states)
    measured = measure(answers.corpus, drafts, options.num_ranks)
    if options.save:
        profile = measured.result.profile
        save_heads(
            options.heads,
            found.heads,
            loaded.fingerprint,
            found.base_name,
            profile,
            adapter=found.adapter,
        )
        save_config(options.heads / "evaluate.toml", "evaluate", options)
        save_acceptance(options.heads, measured, found.base_name, answers.sha256)
    printed = summary(measured.result)
    if found.adapter is not None:
        printed["perplexity"] = _perplexities(options, loaded, encoder, answers.corpus)
    return {"heads": str(options.heads), **printed}


def _perplexities(
    options: EvaluateOptions, loaded: LoadedModel, encoder: HiddenStateEncoder, corpus: Corpus
) -> dict[str, float] | None:
    """Compare the base model with its adapter and without; None if its logits are unusual."""
    if not encoder.has_plain_logits:
        note(f"{loaded.name} scales, caps or shifts its logits: its perplexity is not measured")
        return None
    adapted = perplexity(corpus, encoder, loaded.unembedding())
    base = load_base(options)
    plain = perplexity(corpus, HiddenStateEncoder(base), base.unembedding())
    return comparison(plain, adapted)


def _drafts(options: EvaluateOptions, found: DraftHeads, states: HiddenStates) -> Drafts:
    # In float32, because ranks must not hang on how a kernel rounds.
    found.heads.float()
    if isinstance(found.heads, MedusaHeads):
        if options.num_depths is not None:
            raise RunError(
                f"num_depths is {options.num_depths}, but {options.heads} holds Medusa heads, "
                "which have one depth each; leave it out"
            )
        return MedusaDrafts(states, found.heads)
    if found.layer is None:
        raise AssertionError("an MTP module came without its decoder layer")
    num_depths = options.num_depths
    if num_depths is None:
        num_depths = found.profile.max_depth if found.profile else _DEFAULT_DEPTHS
    return MTPDrafts(states, found.heads, found.layer, num_depths)
