"""A base model that no process holds whole: its layers are spread over all of them (FSDP2).

A process has the other parts of a layer only while that layer runs. What is trained is small
compared with the base, so each process has all of it, and a run's state does not depend on the
number of processes.
"""

from torch import nn

from server.errors import ModelError
from server.model.loading import LoadedModel
from training.errors import RunError
from training.loop.processes import Processes


def check_processes(processes: Processes) -> None:
    """Check that there are processes to spread a model over.

    Raises:
        RunError: If there is only one.
    """
    if processes.count == 1:
        raise RunError(
            "sharding is fsdp, but the run has one process; start several by torchrun or "
            "accelerate launch, or leave it out"
        )


def spread(loaded: LoadedModel, processes: Processes) -> LoadedModel:
    """Spread the layers of a base model over the processes, and move the rest to their devices.

    Args:
        loaded: Loaded unpacked on the CPU, because a device need not have room for all of it; not
            to be used any more.
        processes: Those that run the layers together.

    Raises:
        ModelError: If the model's layers are not where they are looked for.
    """
    layers = getattr(loaded.model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"model {loaded.name!r} has no list of layers to spread over the processes; train "
            "without --sharding"
        )
    processes.shard(list(layers))
    return loaded.moved(processes.device)
