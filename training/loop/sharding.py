"""A base model that no process holds whole: its layers are spread over all of them (FSDP2).

A process has the other parts of a layer only while that layer runs. What is trained is small beside
the base, so each process has all of it, and the run's state hangs on no number of processes.
"""

from dataclasses import replace

import torch
from torch import nn

from server.errors import ModelError
from server.model.loading import LoadedModel
from training.commands.options import TrainOptions
from training.errors import RunError
from training.loop.processes import Processes
from training.states.base_model import load_base


def load_base_for(options: TrainOptions, processes: Processes) -> LoadedModel:
    """Load the base model as the options want it: whole, or a part of every layer.

    Raises:
        ModelError: If it cannot be loaded, or its layers are not where they are looked for.
        RunError: If the run cannot work with parts.
    """
    if options.sharding == "none":
        return load_base(options, is_packed=options.method != "medusa2", device=processes.device)
    _check(options, processes.count)
    on = processes.device
    # It is loaded on the CPU, because a device need not have room for all of it.
    dtype = "bfloat16" if options.dtype == "auto" and on.type == "cuda" else options.dtype
    cpu = torch.device("cpu")
    loaded = load_base(replace(options, dtype=dtype), is_packed=False, device=cpu)
    layers = getattr(loaded.model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"model {options.model!r} has no list of layers to spread over the processes; train "
            "without --sharding"
        )
    processes.shard(list(layers))
    return loaded.moved(on)


def _check(options: TrainOptions, count: int) -> None:
    """Refuse what would have one process run the base without the others, or change it.

    Raises:
        RunError: It names the option.
    """
    if options.method == "medusa2":
        raise RunError("method is medusa2, whose adapter lies in the layers; leave out --sharding")
    if options.hidden_cache is not None:
        raise RunError(
            f"hidden_cache is {options.hidden_cache}, of which each process computes what it "
            "lacks, but with sharding all must run the base together; leave out one of them"
        )
    if options.early_stopping:
        raise RunError(
            f"early_stopping is {options.early_stopping}, for which one process measures alone, "
            "but with sharding all must run the base together; leave out one of them"
        )
    if count == 1:
        raise RunError(
            "sharding is fsdp, but the run has one process; start several by torchrun or "
            "accelerate launch, or leave it out"
        )
