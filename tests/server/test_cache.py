"""Where the cache lies, and that nothing half-done ever carries a final name."""

import threading
from pathlib import Path

import pytest

from server.cache import cache_dir, partial_directory


def test_the_cache_can_be_put_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EURYALE_CACHE", str(tmp_path / "here"))

    assert cache_dir("models") == tmp_path / "here" / "models"


def test_a_tilde_in_the_variable_means_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EURYALE_CACHE", "~/models")

    assert cache_dir("costs") == tmp_path / "models" / "costs"


@pytest.mark.parametrize("empty", [None, ""])
def test_the_cache_is_below_the_users_cache_directory_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("EURYALE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
        if empty is not None:
            monkeypatch.setenv(name, empty)
    assert cache_dir("kernels") == tmp_path / ".cache" / "euryale" / "kernels"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir("kernels") == tmp_path / "xdg" / "euryale" / "kernels"


def test_what_is_not_moved_out_of_a_partial_directory_is_gone(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with partial_directory(final) as partial:
        (partial / "whole").write_text("whole")
        (partial / "rest").write_text("rest")
        (partial / "whole").rename(final)

    assert final.read_text() == "whole"
    assert not partial.exists()


def test_an_error_leaves_no_partial_directory(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with partial_directory(tmp_path / "model") as partial:
            (partial / "half").write_text("half")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail_halfway()

    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_the_leftover_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    with partial_directory(tmp_path / "model") as partial:
        pass
    partial.mkdir()
    (partial / "half").write_text("half")

    with partial_directory(tmp_path / "model") as again:
        assert again == partial
        assert list(again.iterdir()) == []


def test_only_one_at_a_time_works_on_the_same_thing(tmp_path: Path) -> None:
    num_inside = 0
    most_inside = 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal num_inside, most_inside
        for _ in range(5):
            with partial_directory(tmp_path / "model") as partial:
                with guard:
                    num_inside += 1
                    most_inside = max(most_inside, num_inside)
                (partial / "file").write_text("mine")
                with guard:
                    num_inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most_inside == 1


def test_different_things_are_worked_on_at_once(tmp_path: Path) -> None:
    with partial_directory(tmp_path / "one") as one, partial_directory(tmp_path / "two") as two:
        assert one != two
