"""The int8 kernel for tests, where this machine runs it."""

import functools

import pytest

from server.errors import CompilationError
from server.model.int8_kernel import Int8Kernel, load_int8_kernel


@functools.cache
def _kernel_or_reason() -> Int8Kernel | str:
    try:
        return load_int8_kernel(lambda line: None)
    except CompilationError as error:
        return str(error)


def own_kernel() -> Int8Kernel:
    """Skips the test where there is none."""
    kernel = _kernel_or_reason()
    if isinstance(kernel, str):
        pytest.skip(kernel)
    kernel.follow_threads()
    return kernel
