"""The directory of what is fetched, converted, compiled and measured once and kept.

All processes of a user share it. Whatever has its final name in it is whole: work happens under
partial names, one process at a time, and a leftover of an interrupted one is removed by the next.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock

CACHE_VARIABLE = "EURYALE_CACHE"
# GGUF files, checkpoints made of them, our own libraries, compiled layers, and step costs.
CacheKind = Literal["gguf", "models", "kernels", "compiled", "costs"]


def cache_dir(kind: CacheKind) -> Path:
    """Where things of a kind are kept; need not exist.

    That is below $EURYALE_CACHE, or below `euryale` in the user's cache directory.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser() / kind
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache) if user_cache else Path.home() / ".cache") / "euryale" / kind


@contextmanager
def partial_directory(final: Path) -> Iterator[Path]:
    """Yield an empty scratch directory next to `final`, held by this process alone.

    Waits while another process works on the same `final`, so check again inside whether it is
    there by now. The scratch directory is gone afterwards; move out of it what is to stay.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial")
    with FileLock(final.with_name(f".{final.name}.lock")):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def file_version(path: Path) -> tuple[int, int] | None:
    """Changes when another file takes a file's place; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
