"""Which options must be the same when a run is resumed: all whose field does not say otherwise.

device: DeviceName = field(default="auto", metadata=MAY_CHANGE)
"""

from dataclasses import fields
from types import MappingProxyType
from typing import Any

_KEY = "may_change_while_interrupted"
MAY_CHANGE = MappingProxyType({_KEY: True})


def kept_options(*settings: Any) -> dict[str, object]:
    """Return the options of dataclasses that must be the same, by name."""
    return {
        item.name: getattr(each, item.name)
        for each in settings
        for item in fields(each)
        if not item.metadata.get(_KEY)
    }
