from pathlib import Path

import pytest

from heads.files import atomic_write, file_sha256


@pytest.mark.parametrize(("mode", "content"), [("w", "grüß dich\n"), ("wb", b"\x00\xff")])
def test_the_file_has_what_was_written(tmp_path: Path, mode: str, content: str | bytes) -> None:
    path = tmp_path / "some" / "directory" / "file"
    with atomic_write(path, mode) as file:
        file.write(content)
    expected = content if isinstance(content, bytes) else content.encode()
    assert path.read_bytes() == expected
    assert [path] == list(path.parent.iterdir())


def test_the_old_file_stays_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
        assert Path(file.name).parent == tmp_path
    assert path.read_text() == "new"


def test_after_an_error_the_old_file_is_as_it_was_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [path] == list(tmp_path.iterdir())


def test_a_directory_in_the_way_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(OSError, match="file"), atomic_write(path) as file:
        file.write("new")
    assert [path] == list(tmp_path.iterdir())


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_sha256(path).startswith("ba7816bf8f01cfea414140de5dae2223")
