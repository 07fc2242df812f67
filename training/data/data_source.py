"""Where rows of data come from: files of JSON lines, or data sets by the `datasets` library.

A data set is named `hf:NAME[:CONFIG][@REVISION]#SPLIT`: NAME is OWNER/NAME on the Hugging Face hub
or a directory on this machine, SPLIT is what `datasets` takes for one (`train`, `train[:1000]`).
Columns are the fields that lines of a file have, nulls are fields that are not there, and columns
of other names are not read.
"""

import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from heads.files import file_sha256
from server.cli.values import REPEATED, ReadBy
from training.data.jsonl import Row, read_rows
from training.errors import DataError

_PREFIX = "hf:"
_SYNTAX = re.compile(
    r"hf:(?P<name>[^:@#]+)(:(?P<config>[^:@#]+))?(@(?P<revision>[^@#]+))?#(?P<split>[^#]+)"
)
# Since then no data set brings code of its own.
_MIN_VERSION = 4
_ANSWERS_OR_PROMPTS = ("messages", "turns", "prompt")
# All that readers of rows look at, and what they reject with an error that names it.
_COLUMNS = (
    *_ANSWERS_OR_PROMPTS,
    *("completion", "id", "question_id", "task_id", "category"),
    *("tools", "functions", "parallel_tool_calls"),
)


@dataclass(frozen=True, slots=True)
class HubData:
    """A part of a data set, by its name.

    Attributes:
        name: OWNER/NAME on the hub, or a directory.
        split: Part of the data set, as `datasets` takes it.
        config: Configuration of the data set; None is the default one.
        revision: Branch, tag or commit; None is the branch that the hub shows first.
    """

    name: str
    split: str
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        config = "" if self.config is None else f":{self.config}"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{_PREFIX}{self.name}{config}{revision}#{self.split}"


DataSource = Path | HubData


def data_source(text: str) -> DataSource:
    """Read the name of a file or of a data set.

    Raises:
        DataError: If it begins like a data set's and goes on otherwise.
    """
    if not text.startswith(_PREFIX):
        return Path(text)
    match = _SYNTAX.fullmatch(text)
    if match is None:
        raise DataError(
            f"{text!r} is no name of a data set; give hf:NAME[:CONFIG][@REVISION]#SPLIT, such as "
            "hf:OWNER/NAME#train"
        )
    return HubData(**match.groupdict())


# As options: one source, and one or several.
DataOption = Annotated[DataSource, ReadBy(data_source, "FILE")]
DataOptions = Annotated[tuple[DataOption, ...], REPEATED]


@dataclass(frozen=True, slots=True)
class OpenData:
    """Rows that can be read more than once.

    Attributes:
        source: Where the rows come from.
        origin: What is known of a data set as it was opened, by name; empty for a file.
    """

    source: DataSource
    origin: Mapping[str, str]
    _table: Iterable[Mapping[str, Any]]

    def rows(self) -> Iterator[Row]:
        """Yield the rows one at a time.

        Raises:
            DataError: If there are none, or a file is broken.
        """
        if isinstance(self.source, Path):
            yield from read_rows(self.source)
        else:
            yield from table_rows(self._table, str(self.source))

    def sha256(self) -> str:
        """Hex digest: of a file as it lies on disk, of a data set's rows as they are read."""
        if isinstance(self.source, Path):
            return file_sha256(self.source)
        digest = hashlib.sha256()
        for row in self.rows():
            digest.update(json.dumps(row.value, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()


def open_data(source: DataSource) -> OpenData:
    """Open a file or a data set; the latter is fetched into the library's cache on disk.

    Raises:
        DataError: If the data set cannot be had, or has no column of a known name.
    """
    if isinstance(source, Path):
        return OpenData(source, {}, ())
    table = _load(source)
    check_columns(table.column_names, str(source))
    origin = {
        "dataset": source.name,
        "config": source.config or "default",
        "revision": source.revision or "default",
        "split": source.split,
        "fingerprint": table._fingerprint,
    }
    known = [name for name in table.column_names if name in _COLUMNS]
    return OpenData(source, origin, table.select_columns(known))


def check_columns(names: Sequence[str], where: str) -> None:
    """Refuse a table that holds neither prompts nor answers.

    Raises:
        DataError: It names the columns that are there.
    """
    if not set(names) & set(_ANSWERS_OR_PROMPTS):
        raise DataError(
            f"{where} has the columns {', '.join(names) or '(none)'}; expected messages, turns or "
            "prompt, or prompt and completion: write the rows to a JSON lines file with such fields"
        )


def table_rows(table: Iterable[Mapping[str, Any]], where: str) -> Iterator[Row]:
    """Turn the rows of a table into those of a file; what is null is left out, as in a file.

    Raises:
        DataError: If there are none.
    """
    number = 0
    for number, values in enumerate(table, start=1):
        yield Row(f"{where}, row {number}", number, _without_nulls(dict(values)))
    if number == 0:
        raise DataError(f"{where} has no rows; give a split with at least one")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _load(source: HubData) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{source} needs the datasets library; run `pip install 'euryale[datasets]'`, or give "
            "a JSON lines file"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < _MIN_VERSION:
        raise DataError(
            f"datasets {datasets.__version__} is installed, which runs code of data sets; run `pip "
            f"install 'datasets>={_MIN_VERSION}'`"
        )
    try:
        return datasets.load_dataset(
            source.name, source.config, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source} cannot be read: {error}; check its name, configuration, revision and split"
        ) from error
