"""`convert`: heads of another layout in, a checkpoint of ours out.

They are Medusa heads of the original layout or, if the source is the base model itself, the MTP
layer that its checkpoint ships.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heads.checkpoint import CONFIG_FILE, save_heads
from heads.original_medusa import load_original_heads
from server.cli.options import Command, Settings
from server.model.loading import LoadedModel
from server.model.native_mtp import load_native_mtp
from training.commands.common import ModelOptions, save_options
from training.errors import RunError


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(ModelOptions):
    """Heads of another layout and their base model.

    Attributes:
        source: Directory of original Medusa heads (config.json and medusa_lm_head.*); or what
            `--model` says, for the MTP layer that the base model ships.
        output: Directory of the heads to write.
        overwrite: Whether heads are replaced that OUTPUT holds.
    """

    source: Path
    output: Path
    overwrite: bool = False


def run(options: ConvertOptions) -> dict[str, Any]:
    """Convert heads; returns the result to print.

    Raises:
        RunError: If `output` holds heads already, or is the source.
        HeadsCheckpointError: If the source cannot be read or does not fit the base model.
        ModelError: If the base model cannot be loaded, or its MTP layer is wanted and cannot be
            read.
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
    loaded = options.load()
    result = (_convert_native if _is_base(options) else _convert_medusa)(options, loaded)
    return {
        "output": str(options.output),
        **result,
        "next": "python -m training evaluate measures their acceptance profile",
    }


def _is_base(options: ConvertOptions) -> bool:
    model = Path(options.model)
    return options.source == model or options.source.resolve() == model.expanduser().resolve()


def _convert_native(options: ConvertOptions, loaded: LoadedModel) -> dict[str, Any]:
    native = load_native_mtp(loaded)
    save_heads(options.output, native.module, loaded.fingerprint, options.model, None)
    return {"layout": native.layout, "layer": 1, "num_layers": native.num_layers}


def _convert_medusa(options: ConvertOptions, loaded: LoadedModel) -> dict[str, Any]:
    heads = load_original_heads(options.source, loaded.unembedding(), loaded.input_embedding())
    save_heads(options.output, heads, loaded.fingerprint, options.model, None)
    save_options(options.output / "convert.toml", CONVERT, {"options": options})
    return {
        "num_heads": heads.config.num_heads,
        "num_layers": heads.config.num_layers,
        "own_unembedding": heads.config.own_unembedding,
    }


CONVERT = Command(
    "convert",
    "Import Medusa heads or an MTP layer that a base model ships.",
    run,
    {"options": Settings(ConvertOptions)},
)
