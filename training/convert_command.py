"""`convert`: Medusa heads of the original layout in, a checkpoint of ours out."""

from typing import Any

from heads.checkpoint import CONFIG_FILE, save_heads
from heads.errors import HeadsCheckpointError
from heads.original_medusa import load_original_heads
from server.errors import ConfigError
from training.base_model import load_base
from training.errors import RunError
from training.options import ConvertOptions


def run(options: ConvertOptions) -> dict[str, Any]:
    """Convert heads; returns the result to print.

    Raises:
        RunError: If `output` holds heads already, or is the source.
        ConfigError: If the source cannot be read or does not fit the base model.
        ModelError: If the base model cannot be loaded.
    """
    if options.output.resolve() == options.source.resolve():
        raise RunError(
            f"output is {options.output}, the source itself, which would be overwritten; give "
            "another --output"
        )
    if (options.output / CONFIG_FILE).exists() and not options.overwrite:
        raise RunError(
            f"{options.output} holds heads already; give another --output or --overwrite"
        )
    loaded = load_base(options)
    try:
        heads = load_original_heads(options.source, loaded.unembedding(), loaded.input_embedding())
    except HeadsCheckpointError as error:
        raise ConfigError(str(error)) from error
    save_heads(options.output, heads, loaded.fingerprint, options.model, None)
    return {
        "output": str(options.output),
        "num_heads": heads.config.num_heads,
        "num_blocks": heads.config.num_blocks,
        "own_unembedding": heads.config.own_unembedding,
        "next": "python -m training evaluate measures their acceptance profile",
    }
