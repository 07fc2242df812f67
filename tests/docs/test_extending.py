import re
from typing import Any

import pytest

from tests.docs.pages import page

BLOCK = re.compile(
    r"^## (?P<title>.+?)\n.*?^```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)


def toys() -> dict[str, str]:
    """Source of the toy in each section of the page."""
    sections = re.split(r"^(?=## )", page("extending.md"), flags=re.MULTILINE)
    found = (BLOCK.match(section) for section in sections)
    return {match["title"]: match["code"] for match in found if match is not None}


@pytest.mark.parametrize("title", toys())
def test_toys_can_be_run(title: str) -> None:
    names: dict[str, Any] = {"__name__": "toy"}
    exec(toys()[title], names)
    assert any(isinstance(value, type) and value.__module__ == "toy" for value in names.values())
