"""What instructions machine code that is compiled here may use."""

import platform
from pathlib import Path


def cpu_features() -> str:
    """Names of the CPU's features, separated by spaces; the processor's name if it tells none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    flags = (line for line in lines if line.startswith(("flags", "Features")))
    return next(flags, platform.processor())
