"""Hidden states on disk, by key: safetensors files that are written once and then only read.

    DIR/hidden-<digest of its keys>.safetensors    the states of some documents, each a tensor XD
                                                   under its document's key; the header holds a
                                                   checksum of each

A file is there whole or not at all, so a process that is killed loses at most the one that it was
writing, and any number of processes may write into one directory. The caller decides what a key
means.

Shape suffixes: X tokens of one document, D model width.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.data.jsonl import replace_file
from training.errors import DataError, RunError

_KIND = "euryale-hidden-states-1"
_SUFFIX = ".safetensors"
# Errors of reading a file whose bytes are not those that were written.
_ERRORS = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError)


class HiddenStore:
    """The hidden states in one directory.

    Args:
        directory: Made on the first write.

    Raises:
        DataError: If a file in it is damaged or holds something else.
        RunError: If it is no directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path_of: dict[str, Path] = {}
        self._known: set[Path] = set()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._path_of

    def refresh(self) -> None:
        """Take note of what other processes have written.

        Raises:
            DataError: If a file is damaged or holds something else.
            RunError: If the directory is none.
        """
        if self._directory.exists() and not self._directory.is_dir():
            raise RunError(f"{self._directory} is no directory; give another --hidden-cache")
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            if path not in self._known:
                self._path_of |= dict.fromkeys(_checksums(path), path)
                self._known.add(path)

    def write(self, states: Mapping[str, Tensor]) -> None:
        """Add the states of some documents, in one file.

        Args:
            states: Tensors XD by key.

        Raises:
            RunError: If the disk is full or fails; what was there is still whole.
        """
        stored = {key: states_XD.to("cpu").contiguous() for key, states_XD in states.items()}
        checksums = {key: _checksum(states_XD) for key, states_XD in stored.items()}
        digest = hashlib.sha256("\n".join(sorted(stored)).encode()).hexdigest()
        path = self._directory / f"hidden-{digest[:32]}{_SUFFIX}"
        metadata = {"kind": _KIND, "crc32": json.dumps(checksums)}
        replace_file(path, safetensors.torch.save(stored, metadata))
        self._path_of |= dict.fromkeys(stored, path)
        self._known.add(path)

    def read(self, keys: Sequence[str]) -> list[Tensor]:
        """Return the states XD of keys that are there, on the CPU; they may lie in the file.

        Raises:
            DataError: If a file has vanished or is damaged.
        """
        keys_of: dict[Path, list[str]] = {}
        for key in dict.fromkeys(keys):
            keys_of.setdefault(self._path_of[key], []).append(key)
        found: dict[str, Tensor] = {}
        for path, wanted in keys_of.items():
            found |= _read(path, wanted)
        return [found[key] for key in keys]


def _checksum(states_XD: Tensor) -> int:
    return zlib.crc32(states_XD.view(torch.uint8).numpy().data)


def _checksums(path: Path) -> Mapping[str, int]:
    """The checksum of each document in a file; reads its header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return _header(path, file.metadata(), list(file.keys()))
    except _ERRORS as error:
        raise _damage(path, error) from error


def _header(
    path: Path, metadata: Mapping[str, str] | None, keys: Sequence[str]
) -> Mapping[str, int]:
    if metadata is None or metadata.get("kind") != _KIND:
        raise DataError(f"{path} holds no hidden states; give a --hidden-cache of its own")
    checksums: Mapping[str, int] = json.loads(metadata["crc32"])
    if checksums.keys() != set(keys):
        raise ValueError("its checksums are of other documents than its states")
    return checksums


def _read(path: Path, keys: Sequence[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            checksums = _header(path, file.metadata(), list(file.keys()))
            for key in keys:
                found[key] = file.get_tensor(key)
                if _checksum(found[key]) != checksums[key]:
                    raise ValueError(f"the states of document {key} have another checksum")
    except _ERRORS as error:
        raise _damage(path, error) from error
    return found


def _damage(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is damaged ({error}); remove it and run the same command again: its hidden "
        "states are then computed again"
    )
