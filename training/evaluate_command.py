"""`evaluate`: heads and answers that they were not trained on in, the acceptance profile out."""

from typing import Any

from heads.checkpoint import save_heads
from server.model.draft_heads import load_draft_heads
from training.base_model import check_base, load_base
from training.dataset import load_corpus
from training.errors import DataError
from training.hidden_states import HiddenStateEncoder
from training.jsonl import file_sha256
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
    check_base(options.data, loaded)
    found = load_draft_heads(options.heads, loaded)
    corpus = load_corpus(options.data, loaded.vocab_size, options.limit)
    if corpus.num_examples == 0:
        raise DataError(f"{options.data} has no answer of two tokens; distill more")
    encoder = HiddenStateEncoder(loaded)
    measured = measure(corpus, encoder, found.heads.float(), options.num_ranks)
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
        save_acceptance(options.heads, measured, found.base_name, file_sha256(options.data))
    return {"heads": str(options.heads), **summary(measured.result)}
