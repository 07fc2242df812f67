import logging
from collections.abc import Iterator

import pytest

from server.cli.console import LOGGER, log_to_stderr, print_error, progress_bar


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    logger, root = logging.getLogger(LOGGER), logging.getLogger()
    before = logger.handlers[:], logger.level, root.handlers[:], root.level
    yield
    logger.handlers[:], level, root.handlers[:], root_level = before
    logger.setLevel(level)
    root.setLevel(root_level)


def test_lines_of_ours_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    log_to_stderr()
    logging.getLogger("euryale.engine").info("[bold]%d blocks[/bold]", 3)
    logging.getLogger("euryale.engine").debug("not shown")
    logging.getLogger("others").warning("not shown")
    captured = capsys.readouterr()
    assert captured.err == "[bold]3 blocks[/bold]\n"
    assert captured.out == ""


def test_a_later_call_sets_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    log_to_stderr("warning")
    logging.getLogger("euryale.engine").info("not shown")
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_lines_dim(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    log_to_stderr()
    logging.getLogger("euryale").info("hello")
    assert capsys.readouterr().err == "\x1b[2mhello\x1b[0m\n"


def test_lines_of_all_loggers_can_have_times(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr("info", has_times=True)
    logging.getLogger("others").info("hello")
    assert capsys.readouterr().err.endswith(" INFO hello\n")


def test_only_the_first_process_shows_lines_but_any_shows_its_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    log_to_stderr()
    logging.getLogger("euryale").info("hello")
    with progress_bar("steps", 2, log_interval_s=0.0) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""
    print_error(ValueError("two\n  lines [x]"))
    assert capsys.readouterr().err == "process 1: error: two lines [x]\n"


def test_an_error_is_one_line_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(ValueError("word " * 100))
    assert capsys.readouterr().err == f"error: {('word ' * 100).strip()}\n"


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar("answers", 4, "tokens", log_interval_s=0.0) as bar:
        bar.advance()
        bar.add(100)
        bar.advance(2)
        bar.show("[loss] 0.5")
        bar.advance()
    first, second, third = [
        line for line in capsys.readouterr().err.splitlines() if "min left" in line
    ]
    assert first == "answers: 1 of 4, going on, 0 min left"
    assert "answers: 3 of 4, " in second
    assert second.endswith("tokens/s, 0 min left")
    assert third == "answers: 4 of 4, [loss] 0.5, 0 min left"


def test_lines_are_no_more_frequent_than_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("answers", 4) as bar:
        bar.advance()
    assert "min left" not in capsys.readouterr().err
