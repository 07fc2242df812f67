"""What runs on the device, behind one seam: the executors, and the table that names them."""

from collections.abc import Callable, Mapping

from server.executor.executor import Drafter, Executor
from server.executor.host import HostExecutor
from server.executor.model_runner import ModelRunner
from server.kv.kv_cache import KVLayout

MakeExecutor = Callable[[ModelRunner, KVLayout, Mapping[str, Drafter]], Executor]

# By the kind of device that the model is on.
EXECUTORS: dict[str, MakeExecutor] = {
    "cpu": HostExecutor,
    "cuda": HostExecutor,
}
