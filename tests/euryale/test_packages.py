import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import server.cli.options
from server.cli import main

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ["bench", "euryale", "heads", "server", "training"]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_installed_with_their_types(package: str) -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    assert f"{package}*" in setuptools["packages"]["find"]["include"]
    assert "py.typed" in setuptools["package-data"]["*"]
    assert (ROOT / package / "py.typed").read_bytes() == b""


def test_the_command_is_the_one_of_the_package() -> None:
    module, _, name = PROJECT["project"]["scripts"]["euryale"].partition(":")
    assert getattr(import_module(module), name) is main


def test_what_command_lines_are_built_from_is_this() -> None:
    assert server.cli.options.__all__ == [
        "POSITIONAL",
        "REPEATED",
        "Between",
        "Choice",
        "Command",
        "Count",
        "Parsed",
        "Program",
        "ReadBy",
        "Settings",
        "Whole",
        "to_toml_file",
    ]
