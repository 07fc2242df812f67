"""Heads on disk: a directory that says for which base model it was trained, and is checked for it.

    config.json               format, type, sizes, the base's name and fingerprint, file digests
    heads.safetensors         the weights, an MTP module's decoder layer included, and the draft
                              vocabulary as int32
    acceptance_profile.json   measured accept rates, if there are any
    adapter/                  LoRA adapter that the base is served with, in PEFT's format, if the
                              heads were trained with one

Nothing is unpickled. config.json is written last and holds the digests of the others, so that
an interrupted save is never taken for a whole one. Loading is strict: what is missing, unknown or
damaged is an error, and so are heads of another base model, whose drafts would all be rejected.

Shape suffixes: V vocabulary, D model width.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from heads.errors import HeadsCheckpointError, HeadsMismatchError
from heads.files import atomic_write
from heads.kinds import TYPES, AnyHeads, BaseParts, build_heads, describe, renamed, type_of
from heads.lora import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterFiles
from heads.tree_search import AcceptanceProfile

FORMAT = "euryale-heads"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "heads.safetensors"
PROFILE_FILE = "acceptance_profile.json"
ADAPTER_DIR = "adapter"

_CONFIG_KEYS = {"format", "format_version", "type", "heads", "base", "sha256"}
_ADAPTER_CONFIG = f"{ADAPTER_DIR}/{ADAPTER_CONFIG_FILE}"
_ADAPTER_WEIGHTS = f"{ADAPTER_DIR}/{ADAPTER_WEIGHTS_FILE}"
_KNOWN_FILES = {WEIGHTS_FILE, PROFILE_FILE, _ADAPTER_CONFIG, _ADAPTER_WEIGHTS}
_MAX_SAMPLED_PARAMETERS = 64
_SAMPLES_PER_PARAMETER = 4
# A weight that went through bfloat16 or float16 is still taken for the same.
_RELATIVE_TOLERANCE = 2.0**-7
_ABSOLUTE_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class BaseFingerprint:
    """What tells one base model from another: its layout and a few of its weights.

    Attributes:
        samples: Weights at fixed places of the model, at most 256.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    samples: tuple[float, ...]

    @classmethod
    def of(
        cls,
        model_type: str,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        parameters: Iterable[tuple[str, Tensor]],
    ) -> Self:
        """Take the fingerprint of a base model; synchronises with its device.

        Args:
            model_type: Architecture, as transformers names it.
            num_layers: Decoder layers.
            hidden_size: Model width.
            vocab_size: Rows of the unembedding.
            parameters: Names and weights in any order, as `named_parameters` gives them, before
                any packing or quantisation.
        """
        by_name = sorted((item for item in parameters if item[1].numel() > 0), key=itemgetter(0))
        samples: list[float] = []
        for index in _evenly_spaced(len(by_name), _MAX_SAMPLED_PARAMETERS):
            flat = by_name[index][1].detach().reshape(-1)
            positions = _evenly_spaced(flat.numel(), _SAMPLES_PER_PARAMETER)
            samples += flat[positions].float().tolist()
        return cls(model_type, num_layers, hidden_size, vocab_size, tuple(samples))

    def difference(self, other: "BaseFingerprint") -> str | None:
        """Return None if both are of the same base, up to 16-bit rounding, else what differs."""
        for name in ("model_type", "num_layers", "hidden_size", "vocab_size"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {mine} against {theirs}"
        if len(self.samples) != len(other.samples):
            return f"{len(self.samples)} weights were sampled against {len(other.samples)}"
        pairs = list(zip(self.samples, other.samples, strict=True))
        unequal = [pair for pair in pairs if not _is_same_weight(*pair)]
        if unequal:
            mine, theirs = unequal[0]
            return (
                f"{len(unequal)} of {len(pairs)} sampled weights differ, "
                f"the first is {mine:.6g} against {theirs:.6g}"
            )
        return None

    def describe(self) -> str:
        """Return the layout in words."""
        return (
            f"{self.model_type}, {self.num_layers} layers, width {self.hidden_size}, "
            f"vocabulary {self.vocab_size}"
        )


def _evenly_spaced(length: int, count: int) -> list[int]:
    if length <= count:
        return list(range(length))
    return [(2 * index + 1) * length // (2 * count) for index in range(count)]


def _is_same_weight(mine: float, theirs: float) -> bool:
    tolerance = _ABSOLUTE_TOLERANCE + _RELATIVE_TOLERANCE * max(abs(mine), abs(theirs))
    return abs(mine - theirs) <= tolerance


@dataclass(frozen=True, slots=True, eq=False)
class LoadedHeads:
    """Heads from a checkpoint, in eval mode.

    Attributes:
        profile: Measured accept rates, if the checkpoint has them.
        base_name: Name of the base model that the heads were trained for.
        config: The whole of config.json.
        adapter: What is merged into that base model, if anything.
    """

    heads: AnyHeads
    profile: AcceptanceProfile | None
    base_name: str
    config: Mapping[str, Any]
    adapter: AdapterFiles | None


def save_heads(
    directory: Path,
    heads: AnyHeads,
    base: BaseFingerprint,
    base_name: str,
    profile: AcceptanceProfile | None,
    dtype: torch.dtype = torch.bfloat16,
    adapter: AdapterFiles | None = None,
) -> None:
    """Write a checkpoint, replacing one that is there; other files of the directory stay.

    Args:
        directory: Where the checkpoint goes; created if needed.
        heads: What to save, on any device.
        base: Fingerprint of the base model that they were trained for.
        base_name: How to call that base in messages.
        profile: Accept rates measured for these heads, if any.
        dtype: Type of the weights on disk.
        adapter: What was merged into that base model, if anything; the fingerprint is without it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    contents = {WEIGHTS_FILE: safetensors.torch.save(_tensors_to_store(heads, dtype))}
    if profile is not None:
        contents[PROFILE_FILE] = _to_json_bytes(profile.to_json())
    if adapter is not None:
        (directory / ADAPTER_DIR).mkdir(exist_ok=True)
        contents |= {_ADAPTER_CONFIG: adapter.config, _ADAPTER_WEIGHTS: adapter.weights}
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "type": type_of(heads),
        "heads": describe(heads),
        "base": {"name": base_name, "fingerprint": asdict(base)},
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    for name, data in (contents | {CONFIG_FILE: _to_json_bytes(config)}).items():
        with atomic_write(directory / name, "wb") as file:
            file.write(data)
    for name in _KNOWN_FILES - contents.keys():
        (directory / name).unlink(missing_ok=True)


def _tensors_to_store(heads: AnyHeads, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else torch.int32)
        for name, tensor in heads.state_dict().items()
    }


def _to_json_bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def load_heads(
    directory: Path,
    parts: BaseParts,
    base: BaseFingerprint,
    device: torch.device,
    dtype: torch.dtype,
) -> LoadedHeads:
    """Load heads for a base model and check that they belong to it.

    Args:
        directory: A checkpoint that `save_heads` wrote.
        parts: What the heads take from the base model; matrices are used by reference if device and
            dtype fit.
        base: Fingerprint of the loaded base model.
        device: Where the heads run.
        dtype: Type of their weights.

    Raises:
        HeadsCheckpointError: If the checkpoint is missing, incomplete, damaged or unknown.
        HeadsMismatchError: If the heads were trained for another base model.
    """
    config = _read_config(directory)
    base_name = _check_base(directory, config, base)
    parts = replace(
        parts,
        unembedding_VD=parts.unembedding_VD.to(device, dtype),
        input_embedding_VD=parts.input_embedding_VD.to(device, dtype),
    )
    try:
        tensors = renamed(safetensors.torch.load(_read_verified(directory, WEIGHTS_FILE, config)))
        ids_U = tensors.get("draft_vocab_ids")
        heads = build_heads(config["type"], config["heads"], ids_U, parts)
        heads.load_state_dict(tensors, strict=True)
        heads.to(device, dtype)
        profile = None
        if PROFILE_FILE in config["sha256"]:
            data = json.loads(_read_verified(directory, PROFILE_FILE, config))
            profile = AcceptanceProfile.from_json(data)
    except (RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise HeadsCheckpointError(f"the heads in {directory} cannot be loaded: {error}") from error
    adapter = _read_adapter(directory, config)
    return LoadedHeads(heads.eval(), profile, base_name, config, adapter)


def load_adapter(directory: Path, base: BaseFingerprint) -> AdapterFiles | None:
    """Read what is to be merged into the base model of some heads; None if nothing is.

    Args:
        directory: A checkpoint that `save_heads` wrote.
        base: Fingerprint of the loaded base model before anything is merged into it.

    Raises:
        HeadsCheckpointError: If the checkpoint is missing, incomplete, damaged or unknown.
        HeadsMismatchError: If the heads were trained for another base model.
    """
    config = _read_config(directory)
    _check_base(directory, config, base)
    return _read_adapter(directory, config)


def _read_adapter(directory: Path, config: Mapping[str, Any]) -> AdapterFiles | None:
    if not config["sha256"].keys() & {_ADAPTER_CONFIG, _ADAPTER_WEIGHTS}:
        return None
    return AdapterFiles(
        _read_verified(directory, _ADAPTER_CONFIG, config),
        _read_verified(directory, _ADAPTER_WEIGHTS, config),
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise HeadsCheckpointError(
            f"{path} cannot be read ({error}); give the directory of a heads checkpoint"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise HeadsCheckpointError(f"{path} is not a heads checkpoint: its format is not {FORMAT}")
    version, kind = config.get("format_version"), config.get("type")
    if version != FORMAT_VERSION or kind not in TYPES:
        raise HeadsCheckpointError(
            f"{path} has format_version {version!r} and type {kind!r}; this release reads "
            f"version {FORMAT_VERSION} and the types {', '.join(TYPES)}"
        )
    if set(config) != _CONFIG_KEYS or not isinstance(config["sha256"], dict):
        raise HeadsCheckpointError(
            f"{path} has the keys {sorted(config)}; exactly {sorted(_CONFIG_KEYS)} are known"
        )
    unknown = sorted(config["sha256"].keys() - _KNOWN_FILES)
    if unknown:
        raise HeadsCheckpointError(
            f"{path} lists the files {unknown}; this release knows {sorted(_KNOWN_FILES)}"
        )
    return config


def _check_base(directory: Path, config: Mapping[str, Any], base: BaseFingerprint) -> str:
    """Check that the heads belong to a base model; returns what they call it."""
    base_name, trained_for = _read_base(config, directory)
    difference = trained_for.difference(base)
    if difference is not None:
        raise HeadsMismatchError(
            f"the heads in {directory} were trained for {base_name} ({trained_for.describe()}), "
            f"but the loaded base model is another one ({base.describe()}): {difference}; "
            "serve the model they were trained for, or train heads for this one"
        )
    return base_name


def _read_base(config: Mapping[str, Any], directory: Path) -> tuple[str, BaseFingerprint]:
    try:
        base = config["base"]
        values = base["fingerprint"] | {"samples": tuple(base["fingerprint"]["samples"])}
        return str(base["name"]), BaseFingerprint(**values)
    except (KeyError, TypeError) as error:
        raise HeadsCheckpointError(
            f"the base in {directory / CONFIG_FILE} is malformed ({error!r}); save the heads again"
        ) from error


def _read_verified(directory: Path, name: str, config: Mapping[str, Any]) -> bytes:
    path = directory / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HeadsCheckpointError(
            f"{path} cannot be read ({error}); copy or save the whole checkpoint again"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != config["sha256"].get(name):
        raise HeadsCheckpointError(
            f"{path} is damaged or incomplete: it has {len(data)} bytes with sha256 {digest}, "
            f"not {config['sha256'].get(name)}; copy or save the whole checkpoint again"
        )
    return data
