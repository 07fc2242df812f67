"""Programs that stand in for those that tests cannot have."""

import sys
from pathlib import Path


def fake_llama_server(directory: Path) -> Path:
    """A program that behaves as llama.cpp's server."""
    source = Path(__file__).with_name("fake_llama_server.py")
    program = directory / "llama-server.py"
    _, _, rest = source.read_text().partition("\n")
    program.write_text(f"#!{sys.executable}\n{rest}")
    program.chmod(0o755)
    return program
