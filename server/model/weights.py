"""Reads a checkpoint's weights; strict where `transformers` would only warn."""

from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.errors import ModelError

# What `from_pretrained` raises for files that are missing, damaged or of an unknown kind.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError)
_MAX_NAMED_KEYS = 4


def load_weights(name: str, source: str, **options: Any) -> PreTrainedModel:
    """Call `AutoModelForCausalLM.from_pretrained` and check that every weight came from a file.

    Args:
        name: What errors call the model.
        source: Local directory or hub id.
        options: Passed on to `from_pretrained`.

    Raises:
        ModelError: If a file is missing or damaged, or a weight would be initialised at random.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot load the weights of {name}: {error}; check that its files are whole, hold "
            "safetensors or GGUF, and fit into memory"
        ) from error
    model: PreTrainedModel
    model, report = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in report[problem])
        if keys:
            raise ModelError(
                f"the checkpoint of {name} has {len(keys)} {problem.replace('_', ' ')}, like "
                f"{keys[:_MAX_NAMED_KEYS]}; it is incomplete or of another architecture"
            )
    return model
