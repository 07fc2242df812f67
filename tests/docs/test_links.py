import re
from pathlib import Path

import pytest

from tests.docs.pages import IDS, PAGES, ROOT, anchors, links, prose_lines, spans

MAX_LINE = 110
MAX_LINES = {"README.md": 60, "docs/architecture.md": 120, "docs/benchmarks.md": 200}
# Paths of the repository begin so; other paths are of the reader's machine.
OUR_PATH = re.compile(r"(heads|server|training|bench|tests|docs)/[\w./{},*-]*")
OUR_MODULE = re.compile(r"(heads|server|training|bench|tests)(\.\w+)+")
RESULTS = ROOT / "bench" / "results" / "cpu"


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in links(path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_page_is_linked_from_the_readme_or_another_page(path: Path) -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        if page != path
        for target in links(page.read_text(encoding="utf-8"))
    }
    assert path in linked or path.name == "README.md"


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_path_that_a_page_names_exists(path: Path) -> None:
    for span in spans(path.read_text(encoding="utf-8")):
        if OUR_PATH.fullmatch(span):
            assert any(ROOT.glob(span.rstrip("/"))), span


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_module_that_a_page_names_exists(path: Path) -> None:
    for span in spans(path.read_text(encoding="utf-8")):
        if OUR_MODULE.fullmatch(span):
            assert module_has(span), span


def module_has(name: str) -> bool:
    """Whether a dotted name is a module or package, or is defined in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        if place.is_dir():
            return length == len(parts)
        file = place.with_suffix(".py")
        if file.is_file():
            source = file.read_text(encoding="utf-8")
            return all(re.search(rf"\b(def|class) {part}\b", source) for part in parts[length:])
    return False


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_result_file_that_a_page_names_exists(path: Path) -> None:
    for span in spans(path.read_text(encoding="utf-8")):
        if (
            re.fullmatch(r"\w+\.json", span)
            and span != "summary.json"
            and path.stem == "benchmarks"
        ):
            assert (RESULTS / span).is_file(), span


def test_every_result_file_is_named_by_a_page() -> None:
    named = {span for path in PAGES for span in spans(path.read_text(encoding="utf-8"))}
    unnamed = {path.name for path in RESULTS.glob("*.json")} - named
    assert not unnamed


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_lines_of_prose_are_wrapped(path: Path) -> None:
    for number, line in prose_lines(path.read_text(encoding="utf-8")):
        assert len(line) <= MAX_LINE or line.startswith("|"), f"line {number}"


@pytest.mark.parametrize("name", MAX_LINES)
def test_pages_stay_as_short_as_they_are_meant_to_be(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MAX_LINES[name]


@pytest.mark.parametrize("package", ["server", "training", "bench"])
def test_the_map_of_the_architecture_has_every_room(package: str) -> None:
    rooms = {f"{package}/{path.parent.name}" for path in (ROOT / package).glob("*/__init__.py")}
    modules = {
        f"{package}/{path.name}" for path in (ROOT / package).glob("*.py") if package == "server"
    }
    named = set(spans((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    assert rooms | modules - {"server/__init__.py"} <= named
