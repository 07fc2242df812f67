"""Compiles one module for all that differ from it only in their tensors, and keeps the result.

The module is exported with its tensors as inputs and compiled ahead of time by torch's inductor,
which needs a C++ compiler once. Packages stay in the cache under a digest of all that they depend
on: the graph itself, sizes, torch, the CPU and the number of threads.

NOTE: A package is machine code. The cache directory must be as safe as the installation.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from server.cache import cache_dir, file_version, partial_directory
from server.cpu.cpu_info import cpu_features
from server.cpu.int8_kernel import KERNEL_SHIMS
from server.cpu.layer_calls import NUM_TOKENS, ModuleCall
from server.cpu.product_lowerings import register_product_lowerings
from server.cpu.tree_attention import ATTENTION_SHIMS
from server.errors import CompilationError

# Maps the inputs of a call and the module's tensors, in one list, to the output.
Runner = Callable[[list[Tensor]], Tensor]
# To be raised whenever packages come out differently for a reason that the digest does not see.
_RECIPE = 3
_log = logging.getLogger("euryale.cpu")
_SHIMS = KERNEL_SHIMS | ATTENTION_SHIMS
_INDUCTOR_DIRECTORY = "TORCHINDUCTOR_CACHE_DIR"


class _Exported(nn.Module):
    """A module whose tensors are inputs."""

    def __init__(self, call: ModuleCall) -> None:
        super().__init__()
        self._call = call

    def forward(self, inputs: list[Tensor], tensors: list[Tensor]) -> Any:
        return self._call.compute(inputs, tensors)


def compile_call(call: ModuleCall, check: Callable[[Runner], None]) -> Runner:
    """Compile a module, which takes a while, or load what an earlier start compiled.

    Args:
        call: Stands for all calls of the same signature.
        check: Raises a `CompilationError` if the compiled code computes something else than the
            call; a kept package that fails is compiled again.

    Raises:
        CompilationError: If it cannot be exported or compiled, or fails the check.
    """
    kind = type(call.module).__name__
    with warnings.catch_warnings():
        # The exporter warns of its own code.
        warnings.simplefilter("ignore")
        try:
            program = _export(call)
            path = cache_dir("compiled") / f"{_digest(program, call)}.pt2"
            version = file_version(path)
            if version is not None:
                try:
                    return _checked(_load(path), check)
                except (CompilationError, RuntimeError) as error:
                    reason = _first_line(error)
                    _log.info("%s cannot be used, so it is compiled again: %s", path, reason)
            _log.info("compiling %s (once; kept in %s)", kind, path)
            _compile(program, path, version)
            return _checked(_load(path), check)
        except CompilationError:
            raise
        except Exception as error:  # A compiler fails in many ways.
            raise CompilationError(
                f"{kind} cannot be compiled: {type(error).__name__}: {_first_line(error)}"
            ) from error


def _checked(run: Runner, check: Callable[[Runner], None]) -> Runner:
    check(run)
    return run


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _export(call: ModuleCall) -> ExportedProgram:
    num_tokens = Dim("num_tokens", min=1)
    shapes = [
        {axis: num_tokens for axis, size in enumerate(x.shape) if size == NUM_TOKENS}
        for x in call.inputs
    ]
    tensors = call.tensors
    with torch.no_grad():
        program = torch.export.export(
            _Exported(call),
            (call.inputs, tensors),
            dynamic_shapes=(shapes, [None] * len(tensors)),
            strict=False,
        )
    if program.constants:
        raise CompilationError(f"its graph holds tensors of its own: {sorted(program.constants)}")
    return program


def _digest(program: ExportedProgram, call: ModuleCall) -> str:
    parts = (
        _RECIPE,
        _graph(program),
        [
            (tuple(x.shape), x.stride() if x.layout is torch.strided else None, x.dtype)
            for x in (*call.inputs, *call.tensors)
        ],
        torch.__version__,
        torch.get_num_threads(),
        cpu_features(),
    )
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _graph(program: ExportedProgram) -> str:
    """Its operations, without the comments that say where code and its lines lie."""
    text = program.graph_module.print_readable(print_output=False)
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _compile(program: ExportedProgram, path: Path, useless: tuple[int, int] | None) -> None:
    """Put a package there, unless another process was faster.

    Args:
        program: The graph to compile.
        path: Where the package is kept.
        useless: Version of the package that is to be replaced; None if there was none.
    """
    with partial_directory(path) as partial:
        if file_version(path) != useless:
            return
        package = partial / path.name
        # By default inductor writes to a directory of a known name below /tmp.
        with _environment(_INDUCTOR_DIRECTORY, str(partial / "inductor")):
            register_product_lowerings()
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(package),
                inductor_configs={"aot_inductor.custom_ops_to_c_shims": _SHIMS},
            )
        package.replace(path)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _load(path: Path) -> Runner:
    loader = torch._inductor.aoti_load_package(str(path)).loader

    def run(tensors: list[Tensor]) -> Tensor:
        output: Tensor = loader.boxed_run(tensors)[0]
        return output

    return run
