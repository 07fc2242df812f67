"""Conversion of a GGUF file to an ordinary checkpoint directory, done once and cached.

Reading GGUF dequantises every weight in Python, which takes long; the converted float32
safetensors load in seconds.
"""

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from server.cache import cache_dir, partial_directory
from server.errors import ModelError
from server.model.progress import quiet_transformers
from server.model.weights import LOAD_ERRORS, load_weights

_DIGEST_LENGTH = 16
_log = logging.getLogger("euryale.model")


def converted_dir(gguf_name: str, sha256: str) -> Path:
    """Where the conversion of a GGUF file with this name and digest is kept."""
    return cache_dir("models") / f"{Path(gguf_name).stem}-{sha256[:_DIGEST_LENGTH]}"


def convert_gguf(gguf: Path, target: Path) -> None:
    """Make `target` a checkpoint directory with the GGUF file's model and tokenizer.

    Does nothing if it is there. An interrupted conversion leaves no `target`.

    Raises:
        ModelError: If the file cannot be read as a model.
    """
    if target.is_dir():
        return
    with partial_directory(target) as partial:
        if target.is_dir():
            return
        _log.info("converting %s, once; this takes about half a minute for 100 MB", gguf.name)
        converted = partial / "converted"
        try:
            with quiet_transformers():
                _convert(gguf, converted)
        except LOAD_ERRORS as error:
            raise ModelError(
                f"cannot convert {gguf}: {error}; check that the file is whole and of an "
                f"architecture that transformers reads from GGUF, and that {target.parent} has room"
            ) from error
        converted.rename(target)


def _convert(gguf: Path, target: Path) -> None:
    quantised = load_weights(gguf.name, str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # NOTE: A model that was read from GGUF refuses to be saved, so a plain one takes its weights.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            type(quantised.config).from_dict(settings), dtype=torch.float32
        )
    model.load_state_dict(quantised.state_dict(), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
