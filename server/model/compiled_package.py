"""Compiles one module for all that differ from it only in their tensors, and keeps the result.

The module is exported with its tensors as inputs and compiled ahead of time by torch's inductor,
which needs a C++ compiler once. Packages stay in the cache under a digest of all that they hang
on: the graph itself, sizes, torch, the CPU and the number of threads.

NOTE: A package is machine code. The cache directory must be as safe as the installation.
"""

import hashlib
import platform
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from server.errors import CompilationError
from server.model.block_calls import NUM_TOKENS, ModuleCall
from server.model.cache import cache_dir, partial_directory

# Maps the inputs of a call and the module's tensors, in one list, to the output.
Runner = Callable[[list[Tensor]], Tensor]


class _Exported(nn.Module):
    """A module whose tensors are inputs."""

    def __init__(self, call: ModuleCall) -> None:
        super().__init__()
        self._call = call

    def forward(self, inputs: list[Tensor], tensors: list[Tensor]) -> Any:
        return self._call.compute(inputs, tensors)


def compile_call(call: ModuleCall, report: Callable[[str], None]) -> Runner:
    """Compile a module, or load what an earlier start compiled.

    Args:
        call: Stands for all calls of the same signature.
        report: Called with a short line if it must be compiled, which takes a while.

    Raises:
        CompilationError: If it cannot be exported or compiled.
    """
    kind = type(call.module).__name__
    with warnings.catch_warnings():
        # The exporter warns of its own code.
        warnings.simplefilter("ignore")
        try:
            program = _export(call)
            path = cache_dir() / "compiled" / f"{_digest(program, call)}.pt2"
            kept = _load_kept(path, report)
            if kept is not None:
                return kept
            report(f"compiling {kind} (once; kept in {path})")
            _compile(program, path)
            return _load(path)
        except Exception as error:  # A compiler fails in many ways.
            message = str(error).strip().partition("\n")[0]
            raise CompilationError(
                f"{kind} cannot be compiled: {type(error).__name__}: {message}"
            ) from error


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
        program.graph,
        [
            (tuple(x.shape), x.stride() if x.layout is torch.strided else None, x.dtype)
            for x in (*call.inputs, *call.tensors)
        ],
        torch.__version__,
        torch.get_num_threads(),
        _cpu_features(),
    )
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _compile(program: ExportedProgram, path: Path) -> None:
    with partial_directory(path) as partial:
        # Another process may have been faster.
        if not path.is_file():
            package = partial / path.name
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
            shutil.move(package, path)


def _load_kept(path: Path, report: Callable[[str], None]) -> Runner | None:
    if not path.is_file():
        return None
    try:
        return _load(path)
    except RuntimeError:
        report(f"{path} is damaged")
        # Another process may have found it out as well.
        path.unlink(missing_ok=True)
        return None


def _load(path: Path) -> Runner:
    loader = torch._inductor.aoti_load_package(str(path)).loader

    def run(tensors: list[Tensor]) -> Tensor:
        output: Tensor = loader.boxed_run(tensors)[0]
        return output

    return run


def _cpu_features() -> str:
    """What instructions a package may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    flags = (line for line in lines if line.startswith(("flags", "Features")))
    return next(flags, platform.processor())
