"""How our own sources are built and kept, with one that is built in no time."""

import ctypes
from pathlib import Path

import pytest

from server.cache import CACHE_VARIABLE
from server.cpu import own_library
from server.cpu.own_library import load_library
from server.errors import CompilationError
from tests.support.log_lines import LogLines
from tests.support.own_code import has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
SOURCE = 'extern "C" int answer() { return %d; }'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(own_library, "_loaded", {})
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


def load(source: Path) -> int:
    return load_library(source, set(), answer_of)


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_library, "_loaded", {})


def test_a_library_is_built_once_and_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: LogLines
) -> None:
    assert load(saved(tmp_path)) == 42
    (kept,) = cache.glob("*.so")
    assert log.take() == [f"building answer.cpp (once; kept in {kept})"]

    # Another process finds it, and needs no compiler.
    another_process(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load(saved(tmp_path)) == 42
    assert log.take() == []


def test_another_source_is_another_library(tmp_path: Path) -> None:
    assert load(saved(tmp_path)) == 42
    assert load(saved(tmp_path, 43)) == 43


def test_a_header_belongs_to_the_source_next_to_it(tmp_path: Path) -> None:
    source = saved(tmp_path)
    source.write_text('#include "answer.h"\n' + SOURCE.replace("%d", "ANSWER"))
    header = tmp_path / "answer.h"
    for answer in (42, 43):
        header.write_text(f"constexpr int ANSWER = {answer};")
        assert load(source) == answer


def kept_path(cache: Path, source: Path) -> Path:
    return cache / f"answer_{own_library._digest(source)}.so"


@pytest.mark.parametrize("what", ["garbage", "wrong"])
def test_a_kept_file_that_cannot_be_used_is_built_again(
    cache: Path, tmp_path: Path, what: str, log: LogLines
) -> None:
    source = saved(tmp_path)
    kept = kept_path(cache, source)
    kept.parent.mkdir(parents=True)
    if what == "garbage":
        kept.write_bytes(b"no library")
    else:
        (tmp_path / "other").mkdir()
        own_library._build(saved(tmp_path / "other", -1), kept)
    before = kept.read_bytes()
    assert load(source) == 42
    assert log.take()[0].startswith(f"{kept} cannot be used, so it is built again")
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
def test_without_a_compiler_the_reason_and_the_remedy_are_in_the_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, message: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(CompilationError, match=message):
        load(saved(tmp_path))
    assert list(cache.glob("*.so")) == []


def test_a_source_with_an_error_is_shown_in_the_compilers_words(tmp_path: Path) -> None:
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


def test_a_cpu_without_the_instructions_is_refused_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_library, "cpu_features", lambda: "flags : sse avx2 avx512f")
    with pytest.raises(CompilationError, match="this CPU has no avx512_vnni, avx512bw"):
        load_library(saved(tmp_path), {"avx512f", "avx512bw", "avx512_vnni"}, answer_of)


def test_a_second_openmp_runtime_is_refused_and_so_is_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, both = {"/lib/libgomp.so.1"}, {"/lib/libgomp.so.1", "/lib/libomp.so"}
    monkeypatch.setattr(own_library, "_first_runtimes", lambda: frozenset(own))
    monkeypatch.setattr(own_library, "_openmp_runtimes", lambda: both)
    for answer in (42, 43):
        with pytest.raises(CompilationError, match=r"beside torch's.*: /lib/libomp\.so; set CXX"):
            load(saved(tmp_path, answer))


def test_this_process_has_one_openmp_runtime() -> None:
    assert len(own_library._openmp_runtimes()) <= 1
