"""Output on stderr that does not disturb stdout or the settings of libraries."""

import pytest
from transformers.utils import logging as transformers_logging

from server.model.progress import download_bar, quiet_transformers


def test_a_download_bar_takes_more_bytes_than_it_expected(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with download_bar("downloading", 1000) as update:
        update(500)
        update(2000)

    captured = capsys.readouterr()
    assert captured.out == ""
    assert "downloading" in captured.err


def fail_quietly() -> None:
    with quiet_transformers():
        assert not transformers_logging.is_progress_bar_enabled()
        raise ValueError("broken")


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_bars_of_transformers_are_hidden_and_set_back(is_enabled: bool) -> None:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    try:
        if is_enabled:
            transformers_logging.enable_progress_bar()
        else:
            transformers_logging.disable_progress_bar()
        with pytest.raises(ValueError, match="broken"):
            fail_quietly()

        assert transformers_logging.is_progress_bar_enabled() == is_enabled
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
