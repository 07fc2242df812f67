"""Builds our own C++ sources for this CPU when they are first needed, and keeps the libraries.

NOTE: A kept library is machine code. The cache directory must be as safe as the installation.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import subprocess
from collections.abc import Callable, Set
from pathlib import Path
from typing import TypeVar

import torch

from server.cache import cache_dir, file_version, partial_directory
from server.cpu.cpu_info import cpu_features
from server.errors import CompilationError

# Contracted sums would round differently in code that is the same but for its sizes.
_FLAGS = ("-O3", "-std=c++17", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
_OPENMP = ("libgomp", "libomp", "libiomp")
_SECONDS = 300.0
# NOTE: State of the module, as a process cannot load a library twice: its symbols are global.
_loaded: dict[str, object] = {}
_log = logging.getLogger("euryale.cpu")
Kernel = TypeVar("Kernel")


def load_library(source: Path, needed: Set[str], make: Callable[[ctypes.CDLL], Kernel]) -> Kernel:
    """Load a library of our own code, and build it if no earlier start did; once per process.

    Args:
        source: What is compiled; it may include any headers (`*.h`) in the same directory.
        needed: Features that the CPU must have, as Linux names them.
        make: Puts a value around the loaded library. Raises a `CompilationError` if the library
            computes nonsense.

    Raises:
        CompilationError: If this CPU cannot run it, or it cannot be built, or computes nonsense.
    """
    missing = needed - set(cpu_features().split())
    if missing:
        raise CompilationError(f"this CPU has no {', '.join(sorted(missing))}")
    try:
        digest = _digest(source)
        if digest not in _loaded:
            path = cache_dir("kernels") / f"{source.stem}_{digest}.so"
            _loaded[digest] = _kept_or_built(source, path, make)
    except (OSError, RuntimeError, ValueError) as error:
        raise CompilationError(f"{source.name} cannot be built or loaded: {error}") from error
    return _loaded[digest]  # type: ignore[return-value]  # the digest determines its type


def _kept_or_built(source: Path, path: Path, make: Callable[[ctypes.CDLL], Kernel]) -> Kernel:
    version = file_version(path)
    if version is not None:
        try:
            return _open(path, make)
        except CompilationError as error:
            _log.info("%s cannot be used, so it is built again: %s", path, error)
    _log.info("building %s (once; kept in %s)", source.name, path)
    with partial_directory(path) as partial:
        if file_version(path) != version:
            # Another process was faster.
            return _open(path, make)
        built = partial / path.name
        _build(source, built)
        # Only what works gets the final name. It is not opened again by that name, under which a
        # library that could not be used may still be loaded.
        kernel = _open(built, make)
        built.replace(path)
    return kernel


def _open(path: Path, make: Callable[[ctypes.CDLL], Kernel]) -> Kernel:
    before = _first_runtimes()
    try:
        library = ctypes.CDLL(str(path))
        others = _openmp_runtimes() - before
        # What was refused once stays in the process, and so is a reason for the next one too.
        if before and others:
            raise CompilationError(
                f"{path.name} brings an OpenMP runtime beside torch's, and the threads of the two "
                f"would wait for each other: {', '.join(sorted(others))}; set CXX to another "
                "compiler"
            )
        kernel = make(library)
        # Compiled layers find the functions of a library that has passed among the symbols of the
        # process, and with them those of the torch library that it is linked to.
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except (OSError, AttributeError) as error:
        raise CompilationError(f"{path.name} cannot be loaded: {error}") from error
    return kernel


@functools.cache
def _first_runtimes() -> frozenset[str]:
    """The OpenMP runtimes that were loaded before any library of our own."""
    return frozenset(_openmp_runtimes())


def _openmp_runtimes() -> set[str]:
    """Paths of the OpenMP runtimes in this process, where Linux lists them."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    paths = (line.split(maxsplit=5)[-1] for line in lines if "/" in line)
    return {path for path in paths if Path(path).name.startswith(_OPENMP)}


def _build(source: Path, built: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    torch_root = Path(torch.__file__).parent
    places = [f"-I{torch_root / 'include'}", f"-L{torch_root / 'lib'}"]
    command = [*compiler, *_FLAGS, *places, str(source), "-ltorch_cpu", "-o", str(built)]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env=environment,
        )
    except FileNotFoundError as error:
        raise CompilationError(f"there is no {compiler[0]}; install g++ or set CXX") from error
    except subprocess.TimeoutExpired as error:
        raise CompilationError(f"{compiler[0]} takes longer than {_SECONDS:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it says nothing"]
        reason = next((line for line in lines if "error:" in line), lines[-1])
        raise CompilationError(
            f"{shlex.join(compiler)} cannot build {source.name} (exit status {done.returncode}), "
            f"install another compiler or set CXX: {reason}"
        )


def _digest(source: Path) -> str:
    """Digest of all that a library depends on; every header in the directory counts."""
    files = [source, *sorted(source.parent.glob("*.h"))]
    texts = [file.read_text(encoding="utf-8") for file in files]
    parts = (*texts, _FLAGS, torch.__version__, cpu_features())
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
