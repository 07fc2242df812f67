"""Reads the MTP layer that a base checkpoint ships, as an `MTPModule`.

Names are those of `native_layouts`. Only the MTP layer's own tensors are read, from safetensors.
The decoder layer in it has the base's class, and `transformers` itself converts its weights (fused
experts and all): it loads them as the only layer of a decoder of that class. What differs between
layouts is gone after loading: the projection's halves are in our order, and norm weights are what
the norm multiplies by, also where a class stores them less one.

Shape suffixes: V vocabulary, D model width.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from heads.mtp import MTPConfig, MTPModule
from server.errors import ModelError
from server.model.decoder_layer import DecoderLayer
from server.model.loading import LoadedModel
from server.model.native_layouts import MTPLayout, find_mtp_layer
from server.model.progress import quiet_transformers
from server.model.safetensors_files import SafetensorsFiles
from server.model.source import resolve_model
from server.model.weights import LOAD_ERRORS

_ONLY_LAYER = "layers.0."
_MAX_NAMED = 4
# Large enough that the norm's epsilon does not count.
_NORM_PROBE = 1e3


@dataclass(frozen=True, slots=True, eq=False)
class NativeMTP:
    """A base checkpoint's own MTP layer.

    Attributes:
        module: In the base's dtype and on its device; drafts from the whole vocabulary.
        layer: Runs the module's decoder layer.
        layout: Name of the model that introduced the checkpoint's layout.
        num_layers: MTP layers of the checkpoint, of which this is the first.
    """

    module: MTPModule
    layer: DecoderLayer
    layout: str
    num_layers: int


def load_native_mtp(loaded: LoadedModel) -> NativeMTP:
    """Load the first MTP layer of the base model's checkpoint.

    Raises:
        ModelError: If there is none, tensors are missing, unknown or damaged, or the layer is not
            of the kind of the base's last decoder layer.
    """
    files = SafetensorsFiles(loaded.name, resolve_model(loaded.name))
    found = find_mtp_layer(loaded.name, files.names, loaded.num_layers)
    layout = found.layout
    layer = DecoderLayer(loaded.model)
    config = MTPConfig(
        loaded.hidden_size, loaded.vocab_size, loaded.vocab_size, norm_eps=_norm_eps(loaded)
    )
    only_layer = _only_layer_config(loaded)
    tensors = files.read([*layout.parts(), *found.decoder, *found.shared])
    _check_shapes(loaded, layout, tensors)
    _check_shared(loaded, layout, tensors)
    ids = torch.arange(loaded.vocab_size)
    state = {"draft_vocab_ids": ids, **_own_state(loaded, layout, tensors)}
    decoder_tensors = {name: tensors[name] for name in found.decoder}
    converted = _converted_layer(loaded, only_layer, layout.decoder_prefix, decoder_tensors)
    state |= {f"block.{name}": tensor for name, tensor in converted.items()}
    module = MTPModule(
        config,
        layer.module.to(loaded.device),
        loaded.unembedding(),
        loaded.input_embedding(),
        ids.to(loaded.device),
    )
    try:
        module.load_state_dict(
            {name: tensor.to(loaded.device) for name, tensor in state.items()},
            strict=True,
            assign=True,
        )
    except RuntimeError as error:
        raise ModelError(
            f"the MTP layer of {loaded.name} does not have the form of the base's last layer: "
            f"{error}; give a base whose MTP layer has"
        ) from error
    module.requires_grad_(False)
    return NativeMTP(module.eval(), layer, layout.name, found.num_layers)


def _only_layer_config(loaded: LoadedModel) -> PreTrainedConfig:
    """The configuration of a decoder whose only layer is like the base's last one."""
    config: PreTrainedConfig = copy.deepcopy(loaded.model.config.get_text_config(decoder=True))
    for name in ("layer_types", "mlp_layer_types"):
        kinds, own = getattr(config, name, None), getattr(config, f"mtp_{name}", None)
        if not kinds:
            continue
        if own and own[0] != kinds[-1]:
            raise ModelError(
                f"the MTP layer of {loaded.name} is of the kind {own[0]!r} and its last layer of "
                f"the kind {kinds[-1]!r}; only MTP layers like the last layer are supported"
            )
        setattr(config, name, [kinds[-1]])
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 0
    config.num_hidden_layers = 1
    # Its embedding is not used, so it is small.
    config.vocab_size, config.pad_token_id = 1, None
    return config


def _converted_layer(
    loaded: LoadedModel, config: PreTrainedConfig, prefix: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the state of the decoder layer in the form in which its class keeps it."""
    renamed = {_ONLY_LAYER + name.removeprefix(prefix): value for name, value in tensors.items()}
    # The decoder has these too, and they are not used.
    renamed["norm.weight"] = torch.ones(loaded.hidden_size)
    renamed["embed_tokens.weight"] = torch.zeros(config.vocab_size, loaded.hidden_size)
    decoder_class: Any = type(loaded.model.base_model)
    try:
        with quiet_transformers():
            decoder, report = decoder_class.from_pretrained(
                None,
                config=config,
                state_dict=renamed,
                dtype=loaded.dtype,
                # So that the report below names them.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot load the decoder layer in the MTP layer of {loaded.name}: {error}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(
            prefix + str(key).removeprefix(_ONLY_LAYER)
            for key in (
                entry[0] if isinstance(entry, tuple) else entry for entry in report[problem]
            )
        )
        if keys:
            raise ModelError(
                f"the decoder layer in the MTP layer of {loaded.name} has {len(keys)} "
                f"{problem.replace('_', ' ')}, like {keys[:_MAX_NAMED]}; the checkpoint is "
                "incomplete, or its layer is not of the kind of the base's last layer"
            )
    state: dict[str, Tensor] = decoder.layers[0].state_dict()
    return state


def _own_state(
    loaded: LoadedModel, layout: MTPLayout, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return what the module has besides its decoder layer, in our form."""
    projection = tensors[layout.prefix + layout.projection].to(loaded.dtype)
    if not layout.is_hidden_first:
        projection = torch.cat(projection.chunk(2, dim=1)[::-1], dim=1)
    norms = {
        "hidden_norm": layout.hidden_norm,
        "embedding_norm": layout.embedding_norm,
        "final_norm": layout.final_norm,
    }
    scales = {
        f"{name}.weight": _norm_scale(loaded, tensors[layout.prefix + theirs])
        for name, theirs in norms.items()
    }
    return {"projection.weight": projection, **scales}


def _norm_scale(loaded: LoadedModel, weight_D: Tensor) -> Tensor:
    """What a norm of the base's class with that weight multiplies by."""
    norm: nn.Module = copy.deepcopy(loaded.model.base_model.get_submodule("norm")).cpu().float()
    norm.load_state_dict({"weight": weight_D.float()}, strict=True)
    with torch.no_grad():
        scale_D: Tensor = norm(torch.full_like(weight_D, _NORM_PROBE, dtype=torch.float32))
    return scale_D.to(loaded.dtype)


def _norm_eps(loaded: LoadedModel) -> float:
    eps = getattr(loaded.model.config.get_text_config(decoder=True), "rms_norm_eps", None)
    if not isinstance(eps, float) or not isinstance(
        getattr(loaded.model.base_model, "norm", None), nn.Module
    ):
        raise ModelError(
            f"{loaded.name} has rms_norm_eps = {eps!r} and no plain final RMS norm to tell how "
            "those of its MTP layer compute; native MTP layers need a base that has"
        )
    return eps


def _check_shapes(loaded: LoadedModel, layout: MTPLayout, tensors: dict[str, Tensor]) -> None:
    width = loaded.hidden_size
    for name in layout.parts():
        expected = (width, 2 * width) if name.endswith(layout.projection) else (width,)
        if tuple(tensors[name].shape) != expected:
            raise ModelError(
                f"{name} of {loaded.name} has shape {tuple(tensors[name].shape)}, the base asks "
                f"for {expected}; the checkpoint is damaged or of another model"
            )


def _check_shared(loaded: LoadedModel, layout: MTPLayout, tensors: dict[str, Tensor]) -> None:
    bases = (loaded.input_embedding(), loaded.unembedding())
    for name, base_VD in zip(layout.shared(), bases, strict=True):
        if name in tensors and not torch.equal(tensors[name].to(base_VD), base_VD):
            raise ModelError(
                f"{name} of {loaded.name} differs from the base's own matrix, which an MTP module "
                "shares; MTP layers with matrices of their own are not supported"
            )
