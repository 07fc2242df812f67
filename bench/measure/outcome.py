"""What a command hands to the program that prints it."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Outcome:
    """A bench's result with what is needed to describe the run.

    Attributes:
        result: The command's dataclass; its fields are the report's top level.
        extra: Further fields: what ran, on which data.
        passed: False if the bench is a check and it failed.
    """

    result: Any
    device: torch.device
    dtype: torch.dtype
    extra: dict[str, Any] = field(default_factory=dict)
    passed: bool = True
