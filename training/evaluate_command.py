"""`evaluate`: heads and answers that they were not trained on in, the acceptance profile out."""

from typing import Any

from heads.checkpoint import save_heads
from heads.medusa import MedusaHeads
from server.model.draft_heads import load_draft_heads
from training.answers import load_answers
from training.base_model import load_base
from training.config_file import save_config
from training.errors import DataError
from training.hidden_states import HiddenStateEncoder
from training.options import EvaluateOptions
from training.report import measure, save_acceptance, summary


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Measure heads and save their profile; returns the result to print.

    Raises:
        DataError: If the data is broken, empty or of another base model.
        ConfigError: If the heads cannot be read.
        HeadsMismatchError: If the heads belong to another base model.
        ModelError: If the base model cannot be loaded.
    """
    loaded = load_base(options, options.heads)
    found = load_draft_heads(options.heads, loaded)
    answers = load_answers(options.data, loaded, options.limit)
    if not isinstance(found.heads, MedusaHeads):
        raise DataError(f"{options.heads} holds an MTP module, which evaluate cannot measure yet")
    encoder = HiddenStateEncoder(loaded)
    measured = measure(answers.corpus, encoder, found.heads.float(), options.num_ranks)
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
    return {"heads": str(options.heads), **summary(measured.result)}
