"""What this machine's CPU is and which instructions it has."""

import platform
from pathlib import Path


def cpu_features() -> str:
    """Names of the CPU's features, separated by spaces; the processor's name if Linux has none."""
    return _first_line(("flags", "Features")) or platform.processor()


def cpu_name() -> str:
    """The CPU's name as its maker writes it; the processor's name if Linux has none."""
    return _first_line(("model name",)).partition(":")[2].strip() or platform.processor()


def _first_line(beginnings: tuple[str, ...]) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(beginnings)), "")
