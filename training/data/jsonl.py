"""JSON lines, plain or gzip-compressed; every error names the file and the line.

An append-only file has one whole line per finished item, so that a process that is killed loses
at most the line it was writing.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from heads.files import atomic_write
from training.errors import DataError, RunError

_GZIP_MAGIC = b"\x1f\x8b"
_EXCERPT_CHARS = 60
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object of a file.

    Attributes:
        where: File and line, for messages.
        number: Line in the file, from 1.
        value: The object.
    """

    where: str
    number: int
    value: dict[str, Any]

    def error(self, problem: str) -> DataError:
        """Make an error that names this line."""
        return DataError(f"{self.where}: {problem}")


def read_rows(path: Path) -> Iterator[Row]:
    """Read a file's objects one at a time; blank lines are skipped.

    Raises:
        DataError: If the file cannot be read, has no rows, or a line is no JSON object.
    """
    is_empty = True
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == _GZIP_MAGIC
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    is_empty = False
                    yield _parsed(line, f"{path}, line {number}", number)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; give a JSON lines file") from error
    if is_empty:
        raise DataError(f"{path} has no rows; give a JSON lines file with at least one")


def _parsed(line: bytes, where: str, number: int) -> Row:
    try:
        value = json.loads(line)
    except ValueError as error:
        excerpt = line.decode(errors="replace").strip()[:_EXCERPT_CHARS]
        raise DataError(
            f"{where}: no valid JSON ({error}): {excerpt!r}; repair the line"
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, got {value!r:.{_EXCERPT_CHARS}}")
    return Row(where, number, value)


def drop_torn_line(path: Path) -> int:
    """Cut off a last line that has no end, as a killed writer leaves it; changes the file.

    Returns:
        The number of bytes dropped.
    """
    size = path.stat().st_size
    with path.open("r+b") as file:
        end = size
        while end > 0:
            start = max(0, end - _CHUNK_BYTES)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
    return size - end


class LineAppender:
    """Appends JSON objects to a file, each handed to the operating system as one whole line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer, which would be written again on closing after a failed write.
            self._file = path.open("ab", buffering=0)

    def append(self, value: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            RunError: If the disk is full or fails; the line may be torn, those before it are whole.
        """
        line = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with _writing(self._path):
            while line:
                line = line[self._file.write(line) or 0 :]

    def sync(self) -> None:
        """Wait until all lines are on the disk.

        Raises:
            RunError: If the disk is full or fails.
        """
        with _writing(self._path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        RunError: If the disk is full or fails; a file that was there stays as it was.
    """
    with _writing(path), atomic_write(path, "wb") as file:
        file.write(data)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file and the remedy where the system only says what went wrong."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}; make room or give another path, then run "
            "the same command again: it goes on from what is saved"
        ) from error
