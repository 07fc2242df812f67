"""The processes that train one module together, on one machine or several.

Each holds the whole module and sees every batch of the plan; of each batch it takes its own part,
and gradients are added up over the processes, so that how many there are changes nothing but the
speed. A launcher starts them (`accelerate launch`, `torchrun`); without one there is one process.

Uses Hugging Face Accelerate; of its parts only the trackers are used elsewhere.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from training.errors import RunError

Item = TypeVar("Item")

# The others wait while one process measures.
_TIMEOUT = timedelta(hours=2)
_SUPPORTED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
# What `accelerate launch` asks for through the environment, and what to do instead.
_UNSUPPORTED_VARIABLES = {
    "ACCELERATE_USE_DEEPSPEED": "launch without --use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "launch without --use_megatron_lm",
    "ACCELERATE_USE_FSDP": "launch without --use_fsdp and give train --sharding fsdp",
}


class Processes:
    """This process among those of the run.

    Args:
        device: `cpu`, `cuda` or `auto`, which takes CUDA if there is a device.
        is_scaled: Whether losses are scaled against float16's narrow range; on CUDA only.

    Attributes:
        device: Device of this process; each has its own where there are several GPUs.
        count: Processes of the run.
        rank: Number of this process, from 0.

    Raises:
        RunError: If the launcher asks for something that is not supported.
    """

    def __init__(self, device: str = "auto", is_scaled: bool = False) -> None:
        _check_environment()
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        if is_scaled and on_cpu:
            raise RunError("fp16 needs a CUDA device; give --mixed-precision bf16 or no")
        self._accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="fp16" if is_scaled else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)],
        )
        kind = self._accelerator.distributed_type
        if kind not in _SUPPORTED:
            raise RunError(f"processes of kind {kind} are not supported; launch on CPUs or on GPUs")
        self.device: torch.device = self._accelerator.device
        self.count: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        self._prepared: nn.Module | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Prepare a module to run; returns what to step in place of its optimiser.

        The parameters stay the same tensors. A module that was prepared before is released.

        NOTE: all processes must begin with the same weights, and run the module equally often.
        """
        prepared: torch.optim.Optimizer
        self._prepared, prepared = self._accelerator.prepare(module, optimizer)
        return prepared

    def run(self, *inputs: object) -> Tensor:
        """Call the prepared module."""
        if self._prepared is None:
            raise AssertionError("no module was prepared")
        output: Tensor = self._prepared(*inputs)
        return output

    def shard(self, layers: Iterable[nn.Module]) -> None:
        """Spread the parameters of layers over the processes, onto their devices.

        Each keeps its part, and gets all of a layer for as long as that runs.

        NOTE: all processes must run these layers equally often.
        """
        mesh = init_device_mesh(self.device.type, (self.count,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)

    def own(self, parts: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share of parts, equally many for each."""
        each = len(parts) // self.count
        return parts[self.rank * each : (self.rank + 1) * each]

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Keep gradients on this process until the last part of its share."""
        if is_last:
            return nullcontext()
        context: AbstractContextManager[None] = self._accelerator.no_sync(self._prepared)
        return context

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss that is to be summed over the processes."""
        # Gradients are averaged over the processes.
        self._accelerator.backward(loss * self.count)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Scale gradients down to a norm; returns the norm before."""
        return float(self._accelerator.clip_grad_norm_(parameters, limit))

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied by before their gradient is taken; 1.0 unless scaled."""
        scaler = self._accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def loss_scaling(self) -> dict[str, float]:
        """Return the state of the loss scaling; empty unless losses are scaled."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def set_loss_scaling(self, state: Mapping[str, float]) -> None:
        """Restore what `loss_scaling` returned."""
        if state:
            self._accelerator.scaler.load_state_dict(dict(state))

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes."""
        total: Tensor = self._accelerator.reduce(values, "sum")
        return total

    def wait(self) -> None:
        """Wait until all processes are here."""
        self._accelerator.wait_for_everyone()

    def end(self) -> None:
        """Leave the others; nothing can be exchanged or run any more."""
        # NOTE: what wraps the module goes before the group that it exchanges gradients by. The last
        # owner of the group waits for its threads, and a wrapper would do so with the interpreter
        # locked, while a thread may still need it to free what it has sent: both wait forever.
        self._prepared = None
        self._accelerator.free_memory()
        self._accelerator.end_training()


def _check_environment() -> None:
    for name, remedy in _UNSUPPORTED_VARIABLES.items():
        if os.environ.get(name, "false").lower() in {"1", "true", "yes"}:
            raise RunError(f"{name} is set, which is not supported; {remedy}")
    num_steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if num_steps != "1":
        raise RunError(
            f"accelerate launch asks for {num_steps} accumulation steps; give that to train as "
            "--gradient-accumulation"
        )
