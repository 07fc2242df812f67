"""Reads Medusa heads in the layout of their first implementation (FasterDecoding/Medusa).

    config.json              medusa_num_heads, medusa_num_layers
    medusa_lm_head.pt        or .safetensors; for head i of L residual layers
        i.j.linear.weight    [D, D], layer j: x + SiLU(W x + b)
        i.j.linear.bias      [D]
        i.L.weight           [V, D], the head's own vocabulary matrix; in the shared-head layout
                             no head has one, and the base model's unembedding is used

Keys may begin with `medusa_head.`. Head i drafts the token i + 1 places after the root, as ours
does; the root itself is not shown to the heads. Pickled files are read with weights only.

Shape suffixes: K draft heads, V vocabulary, D model width.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from heads.errors import HeadsCheckpointError
from heads.medusa import MedusaConfig, MedusaHeads

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_PREFIX = "medusa_head."


def load_original_heads(
    directory: Path, unembedding_VD: Tensor, input_embedding_VD: Tensor
) -> MedusaHeads:
    """Read heads of the original layout for a base model.

    Args:
        directory: Holds the config and one file of weights.
        unembedding_VD: The base model's; gives device, dtype and the sizes that must fit.
        input_embedding_VD: The base model's.

    Raises:
        HeadsCheckpointError: If a file is missing, damaged, holds more than weights, or does not
            fit the base model.
    """
    num_heads, num_layers = _read_sizes(directory / CONFIG_FILE)
    path = _weights_path(directory)
    tensors = _without_prefix(path, _read_weights(path))
    vocab_size, width = unembedding_VD.shape
    own_names = [f"{head}.{num_layers}.weight" for head in range(num_heads)]
    num_own = sum(name in tensors for name in own_names)
    if num_own not in (0, num_heads):
        raise HeadsCheckpointError(
            f"{path} has vocabulary matrices for {num_own} of {num_heads} heads; it must have all "
            "or none of them, so copy it again"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            shapes[f"{head}.{layer}.linear.weight"] = (width, width)
            shapes[f"{head}.{layer}.linear.bias"] = (width,)
    shapes |= dict.fromkeys(own_names, (vocab_size, width)) if num_own else {}
    _check(path, tensors, shapes)
    config = MedusaConfig(
        hidden_size=width,
        vocab_size=vocab_size,
        num_heads=num_heads,
        num_layers=num_layers,
        root_conditioned=False,
        own_unembedding=bool(num_own),
    )
    heads = MedusaHeads(config, unembedding_VD, input_embedding_VD)
    with torch.no_grad():
        for layer in range(num_layers):
            for head in range(num_heads):
                heads.layer_weights[layer, head] = tensors[f"{head}.{layer}.linear.weight"]
                heads.layer_biases[layer, head] = tensors[f"{head}.{layer}.linear.bias"]
        if heads.unembedding_KVD is not None:
            for head, name in enumerate(own_names):
                heads.unembedding_KVD[head] = tensors[name]
    return heads.eval()


def _read_sizes(path: Path) -> tuple[int, int]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise HeadsCheckpointError(
            f"{path} cannot be read ({error}); give a directory with config.json and "
            f"{' or '.join(WEIGHT_FILES)}"
        ) from error
    sizes = []
    for name in ("medusa_num_heads", "medusa_num_layers"):
        size = config.get(name) if isinstance(config, dict) else None
        if type(size) is not int or size < 1:
            raise HeadsCheckpointError(
                f"{path} has {name} = {size!r}; a Medusa checkpoint gives a whole number from 1"
            )
        sizes.append(size)
    return sizes[0], sizes[1]


def _weights_path(directory: Path) -> Path:
    found = [directory / name for name in WEIGHT_FILES if (directory / name).exists()]
    if len(found) != 1:
        raise HeadsCheckpointError(
            f"{directory} has {len(found)} of the files {', '.join(WEIGHT_FILES)}; leave exactly "
            "one file of weights there"
        )
    return found[0]


def _without_prefix(path: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    found = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    if len(found) != len(tensors):
        raise HeadsCheckpointError(
            f"{path} has entries both with and without {_PREFIX!r}; save the heads alone"
        )
    return found


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise HeadsCheckpointError(
            f"{path} is damaged or holds more than weights ({type(error).__name__}); copy it "
            "again, or save its state dict as .safetensors"
        ) from error
    is_state = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    )
    if not is_state:
        raise HeadsCheckpointError(f"{path} is no state dict of tensors; save heads.state_dict()")
    return dict(tensors)


def _check(
    path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in shapes if name not in tensors]
    unknown = sorted(set(tensors) - set(shapes))
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown entry {unknown[0]!r}"
        raise HeadsCheckpointError(
            f"{path} {what}; its config.json must belong to another file of weights"
        )
    for name, shape in shapes.items():
        if not tensors[name].is_floating_point():
            raise HeadsCheckpointError(
                f"{path}: {name!r} is of type {tensors[name].dtype}; quantised heads are not read, "
                "give floating-point weights"
            )
        if tuple(tensors[name].shape) != shape:
            raise HeadsCheckpointError(
                f"{path}: {name!r} has shape {tuple(tensors[name].shape)}, the base model asks for "
                f"{shape}; give the base model that the heads were trained for"
            )
