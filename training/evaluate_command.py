"""`evaluate`: heads and answers that they were not trained on in, the acceptance profile out."""

from typing import Any

from heads.checkpoint import save_heads
from server.model.draft_heads import load_draft_heads
from training.base_model import check_base, load_base
from training.dataset import load_corpus
from training.errors import DataError
from training.evaluate import evaluate
from training.hidden_states import HiddenStateEncoder
from training.options import EvaluateOptions
from training.report import rank_with_progress, summary


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Measure heads and save their profile; returns the result to print.

    Raises:
        DataError: If the data is broken, empty or of another base model.
        ConfigError: If the heads cannot be read.
        HeadsMismatchError: If the heads belong to another base model.
        ModelError: If the base model cannot be loaded.
    """
    loaded = load_base(options)
    check_base(options.data, loaded)
    found = load_draft_heads(options.heads, loaded)
    corpus = load_corpus(options.data, loaded.vocab_size, options.limit)
    if corpus.num_examples == 0:
        raise DataError(f"{options.data} has no answer of two tokens; distill more")
    answers = rank_with_progress(corpus, HiddenStateEncoder(loaded), found.heads.float())
    result = evaluate(answers, options.num_ranks)
    if options.save:
        save_heads(options.heads, found.heads, loaded.fingerprint, found.base_name, result.profile)
    return {"heads": str(options.heads), **summary(result)}
