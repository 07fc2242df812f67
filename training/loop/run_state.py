"""A training run's state on disk: weights, optimiser and step, written whole or not at all.

One safetensors file; its metadata holds the step and the options that the run was begun with.
Version 3 of it had the options of all methods, and `num_blocks` for `num_layers`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from training.data.jsonl import replace_file
from training.errors import RunError
from training.loop.trackers import NO_TRACKING, Tracking

STATE_FILE = "training_state.safetensors"
_KIND = "euryale-training-state-4"
_FORMER_KIND = "euryale-training-state-3"
_BEST = "best."
_FORMER_NAMES = {
    "num_blocks": "num_layers",
    "block_weights": "layer_weights",
    "block_biases": "layer_biases",
}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Where a run writes, and what it is known by.

    Attributes:
        directory: Gets the state and the metrics.
        options: What must be the same when the run is resumed; JSON values.
        tracking: Further places that get the metrics.
    """

    directory: Path
    options: Mapping[str, object]
    tracking: Tracking = NO_TRACKING


@dataclass(frozen=True, slots=True, eq=False)
class Best:
    """The best measurement of a run so far.

    Attributes:
        step: Optimiser steps done when it was taken.
        length: Mean acceptance length on held-out answers.
        weights: The module's weights then, by the names of its parameters, on the CPU.
    """

    step: int
    length: float
    weights: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: Optimiser steps done.
        num_examples: Examples seen.
        loss_scaling: State of the loss scaling, see `Processes.loss_scaling`.
        best: Best measurement; None if the run has not been measured.
    """

    step: int
    num_examples: int
    loss_scaling: Mapping[str, float] = field(default_factory=dict)
    best: Best | None = None


def save_state(
    record: RunRecord, module: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write the state of a run.

    Args:
        record: Says where, and what the run is known by.
        module: Its parameters are saved in full precision.
        optimizer: Has the state of these parameters.
        progress: Where the run stands.
    """
    tensors: dict[str, Tensor] = {f"heads.{name}": p for name, p in module.named_parameters()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    best = progress.best
    if best is not None:
        tensors |= {f"{_BEST}{name}": weight for name, weight in best.weights.items()}
    stored = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    metadata = {
        "kind": _KIND,
        "step": str(progress.step),
        "num_examples": str(progress.num_examples),
        "loss_scaling": json.dumps(dict(progress.loss_scaling)),
        "best": json.dumps(None if best is None else [best.step, best.length]),
        "options": json.dumps(dict(record.options), sort_keys=True),
    }
    replace_file(record.directory / STATE_FILE, safetensors.torch.save(stored, metadata))


def load_state(
    record: RunRecord, module: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress | None:
    """Resume a run: set module and optimiser; None, and nothing set, if there is no state.

    Raises:
        RunError: If the state is damaged, or of a run with other options.
    """
    path = record.directory / STATE_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        kind, saved = metadata.get("kind"), json.loads(metadata.get("options", "{}"))
        if kind == _FORMER_KIND:
            tensors = {_renamed(name): tensor for name, tensor in tensors.items()}
            saved = {_renamed(name): value for name, value in saved.items()}
            # Options of other methods had their defaults.
            others = {name for name in saved.keys() - record.options.keys() if "sha256" not in name}
            saved = {name: value for name, value in saved.items() if name not in others}
        elif kind != _KIND:
            raise ValueError(f"kind is {kind!r}, not {_KIND!r}")
        progress = Progress(
            int(metadata["step"]),
            int(metadata["num_examples"]),
            json.loads(metadata["loss_scaling"]),
            _pop_best(metadata, tensors),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(
            f"{path} is no state of a training run ({error}); remove it to start over"
        ) from error
    _check_options(path, saved, record.options)
    try:
        _set(module, optimizer, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise RunError(
            f"{path} does not fit the heads ({error}); remove it to start over"
        ) from error
    return progress


def _pop_best(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Best | None:
    names = [name for name in tensors if name.startswith(_BEST)]
    weights = {name.removeprefix(_BEST): tensors.pop(name) for name in names}
    found = json.loads(metadata["best"])
    return None if found is None else Best(int(found[0]), float(found[1]), weights)


def _renamed(name: str) -> str:
    """Today's name of an option or a tensor of version 3."""
    path, dot, last = name.rpartition(".")
    return f"{path}{dot}{_FORMER_NAMES.get(last, last)}"


def _check_options(path: Path, saved: Mapping[str, object], options: Mapping[str, object]) -> None:
    # Through JSON, because a saved tuple comes back as a list.
    current = json.loads(json.dumps(dict(options)))
    for name in sorted(saved.keys() | current.keys()):
        if saved.get(name) != current.get(name):
            raise RunError(
                f"{path} is the state of a run with {name} {saved.get(name)!r}, but now it is "
                f"{current.get(name)!r}; give that again, another --output, or remove the file"
            )


def _set(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    parameters = dict(module.named_parameters())
    state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(parameters))}
    loaded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, _, rest = name.partition(".")
        if owner == "heads":
            loaded[rest] = tensor
        else:
            index, _, key = rest.partition(".")
            state[int(index)][key] = tensor
    if loaded.keys() != parameters.keys():
        raise ValueError(f"it has the weights {sorted(loaded)}, not {sorted(parameters)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(loaded[name])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
