"""The pages of the documentation, and what the tests read in them."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)
IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]

_FLAG = re.compile(r"(?<![\w-])--[a-z]([a-z0-9-]*[a-z0-9])?(?![\w-])")
_FENCE = "```"
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`]+)`")


def page(name: str) -> str:
    """The text of a page of `docs/`."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines outside of code blocks, with their numbers."""
    is_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith(_FENCE):
            is_code = not is_code
        elif not is_code and not line.startswith("    "):
            yield number, line


def code_lines(text: str) -> Iterator[str]:
    """Lines of code blocks; a line that ends in a backslash goes on in the next one."""
    is_code, begun = False, ""
    for line in text.splitlines():
        if line.startswith(_FENCE):
            is_code = not is_code
        elif is_code or line.startswith("    "):
            begun += line.strip()
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            yield begun
            begun = ""


def prose(text: str) -> str:
    """The text outside of code blocks."""
    return "\n".join(line for _, line in prose_lines(text))


def links(text: str) -> list[str]:
    """Targets of links that are not of the web."""
    found = _LINK.findall(_SPAN.sub("", prose(text)))
    return [target for target in found if "://" not in target]


def spans(text: str) -> list[str]:
    """What stands between backticks in the prose."""
    return _SPAN.findall(prose(text))


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = [line.lstrip("#").strip() for _, line in prose_lines(text) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(text: str, name: str) -> list[dict[str, str]]:
    """Rows of the table behind the comment `<!-- name -->`, by the heads of its columns."""
    lines = text.partition(f"<!-- {name} -->\n")[2].splitlines()
    assert lines, f"no table behind <!-- {name} -->"
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    head, _, *body = rows
    return [dict(zip(head, row, strict=True)) for row in body]


def code(cell: str) -> str:
    """A table's cell without backticks."""
    return cell.strip("`")


def flags(text: str) -> set[str]:
    """Options that a text names."""
    return {match.group() for match in _FLAG.finditer(text)}
