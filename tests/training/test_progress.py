import re

import pytest

from training.progress import note, progress_bar


def test_progress_goes_to_stderr_with_counts_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("distilling", 3, "tokens") as bar:
        bar.advance()
        bar.add(40)
        bar.advance(2)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(r"distilling .*3/3 .*\d+ tokens/s", printed.err)


def test_a_text_can_stand_in_place_of_the_speed(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("training", 1) as bar:
        bar.show("loss 1.5")
        bar.advance()
    assert "loss 1.5" in capsys.readouterr().err


def test_a_note_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    note("odd [markup] 12")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "odd [markup] 12\n")


def test_where_there_is_no_terminal_lines_tell_how_far_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar("distilling", 4, "tokens", log_interval_s=0.0) as bar:
        bar.add(40)
        bar.advance()
        bar.advance(2)
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 4" in line]
    assert len(lines) == 2
    assert re.match(r"distilling: 3 of 4, \d+ tokens/s, \d+ min left", lines[-1])
