"""How sources of ours are built and kept, with one that is built in no time."""

import ctypes
from pathlib import Path

import pytest

from server.cache import CACHE_VARIABLE
from server.cpu import native_library
from server.cpu.native_library import load_native
from server.errors import CompilationError
from tests.support.own_code import has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
SOURCE = 'extern "C" int answer() { return %d; }'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(native_library, "_loaded", {})
    return tmp_path / "cache" / "kernels"


def saved(directory: Path, answer: int = 42) -> Path:
    source = directory / "answer.cpp"
    source.write_text(SOURCE % answer)
    return source


def answer_of(library: ctypes.CDLL) -> int:
    found = int(library.answer())
    if found < 0:
        raise CompilationError(f"the answer is {found}")
    return found


def load(source: Path, lines: list[str] | None = None) -> int:
    report = (lambda line: None) if lines is None else lines.append
    return load_native(source, set(), answer_of, report)


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "_loaded", {})


def test_a_library_is_built_once_and_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    assert load(saved(tmp_path), lines) == 42
    (kept,) = cache.glob("*.so")
    assert lines == [f"building answer.cpp (once; kept in {kept})"]

    # Another process finds it, and needs no compiler.
    another_process(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    lines.clear()
    assert load(saved(tmp_path), lines) == 42
    assert lines == []


def test_another_source_is_another_library(tmp_path: Path) -> None:
    assert load(saved(tmp_path)) == 42
    assert load(saved(tmp_path, 43)) == 43


def kept_path(cache: Path, source: Path) -> Path:
    return cache / f"answer_{native_library._digest(source)}.so"


@pytest.mark.parametrize("what", ["garbage", "wrong"])
def test_a_kept_file_that_is_of_no_use_is_made_anew(cache: Path, tmp_path: Path, what: str) -> None:
    source = saved(tmp_path)
    kept = kept_path(cache, source)
    kept.parent.mkdir(parents=True)
    if what == "garbage":
        kept.write_bytes(b"no library")
    else:
        (tmp_path / "other").mkdir()
        native_library._build(saved(tmp_path / "other", -1), kept)
    before = kept.read_bytes()
    lines: list[str] = []
    assert load(source, lines) == 42
    assert lines[0].startswith(f"{kept} cannot be used, so it is made anew")
    assert kept.read_bytes() != before


def test_what_computes_nonsense_is_not_kept(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CompilationError, match="the answer is -1"):
        load(saved(tmp_path, -1))
    assert list(cache.glob("*.so")) == []


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "there is no no-such-compiler; install g\\+\\+ or set CXX"),
        ("false", "false cannot build answer.cpp \\(exit status 1\\), install another compiler"),
    ],
)
def test_without_a_compiler_the_reason_and_the_remedy_are_told(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, message: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(CompilationError, match=message):
        load(saved(tmp_path))
    assert list(cache.glob("*.so")) == []


def test_a_source_with_an_error_is_told_with_the_compilers_words(tmp_path: Path) -> None:
    source = tmp_path / "answer.cpp"
    source.write_text("int answer() { return x; }")
    with pytest.raises(CompilationError, match="'x' was not declared"):
        load(source)


@pytest.mark.parametrize("compiler", ["g++ -w", "", " "])
def test_a_compiler_may_have_options_or_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert load(saved(tmp_path)) == 42


def test_a_cache_that_cannot_be_written_is_a_reason_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(CompilationError, match=r"answer\.cpp cannot be built"):
        load(saved(tmp_path))


def test_a_cpu_without_the_instructions_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_library, "cpu_features", lambda: "flags : sse avx2 avx512f")
    with pytest.raises(CompilationError, match="this CPU has no avx512_vnni, avx512bw"):
        load_native(saved(tmp_path), {"avx512f", "avx512bw", "avx512_vnni"}, answer_of, print)


def test_a_second_openmp_runtime_is_refused_and_so_is_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, both = {"/lib/libgomp.so.1"}, {"/lib/libgomp.so.1", "/lib/libomp.so"}
    monkeypatch.setattr(native_library, "_first_runtimes", lambda: frozenset(own))
    monkeypatch.setattr(native_library, "_openmp_runtimes", lambda: both)
    for answer in (42, 43):
        with pytest.raises(CompilationError, match=r"beside torch's.*: /lib/libomp\.so; set CXX"):
            load(saved(tmp_path, answer))


def test_this_process_has_one_openmp_runtime() -> None:
    assert len(native_library._openmp_runtimes()) <= 1
