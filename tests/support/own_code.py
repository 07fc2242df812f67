"""Our own machine code for tests, where this machine runs it."""

import os
import shlex
import shutil

import pytest

from server.cpu.int8_kernel import Int8Kernel, load_int8_kernel
from server.cpu.tree_attention import TreeAttention, load_tree_attention
from server.errors import CompilationError


def own_kernel() -> Int8Kernel:
    """The int8 kernel; skips the test where this machine has no such instructions or compiler."""
    try:
        return load_int8_kernel()
    except CompilationError as error:
        _skip_if_impossible(error)
        raise


def own_attention() -> TreeAttention:
    """The tree attention; skips the test likewise."""
    try:
        return load_tree_attention()
    except CompilationError as error:
        _skip_if_impossible(error)
        raise


def _skip_if_impossible(error: CompilationError) -> None:
    if "this CPU has no" in str(error) or not has_compiler():
        pytest.skip(str(error))


def has_compiler() -> bool:
    """Whether anything can be built here."""
    return shutil.which((shlex.split(os.environ.get("CXX", "")) or ["g++"])[0]) is not None
