"""Single tensors of a checkpoint, wherever it is and in however many files."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from server.errors import ModelError
from server.model.weights import LOAD_ERRORS


class SafetensorsFiles:
    """The tensors of a checkpoint, read by name.

    Args:
        name: What errors call the model.
        source: Local directory or hub id.

    Raises:
        ModelError: If there are no safetensors, or they cannot be listed.
    """

    def __init__(self, name: str, source: str) -> None:
        self._name = name
        self._source = source
        try:
            self._file_of = self._list()
        except (*LOAD_ERRORS, AttributeError) as error:
            raise ModelError(
                f"cannot list the tensors of {name}: {error}; check that its files are whole and "
                "hold safetensors"
            ) from error

    @property
    def names(self) -> list[str]:
        """All tensors of the checkpoint."""
        return list(self._file_of)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors on the CPU in the dtype of the file; reads nothing else.

        Raises:
            ModelError: If a file is missing or damaged.
        """
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file_of[name]].append(name)
        tensors: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(cached_file(self._source, file), framework="pt") as weights:
                    tensors |= {name: weights.get_tensor(name) for name in wanted}
            except LOAD_ERRORS as error:
                raise ModelError(
                    f"cannot read {wanted[0]} of {self._name} from {file}: {error}; copy or "
                    "download the checkpoint again"
                ) from error
        return tensors

    def _list(self) -> dict[str, str]:
        try:
            index = cached_file(self._source, SAFE_WEIGHTS_INDEX_NAME)
        except OSError:
            # Small checkpoints are one file.
            path = cached_file(self._source, SAFE_WEIGHTS_NAME)
            with safe_open(path, framework="pt") as weights:
                return dict.fromkeys(weights.keys(), SAFE_WEIGHTS_NAME)
        shards: dict[str, str] = json.loads(Path(str(index)).read_bytes())["weight_map"]
        return dict(shards)
