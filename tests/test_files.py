"""Writing: what is never lost, and that a file is whole or absent."""

import os
from pathlib import Path

import pytest

from csulora_cli.errors import UsageError
from csulora_cli.files import check_new_file, staged_file

MARK = "<ours>"


def refused(path: Path, overwrite: bool) -> UsageError:
    with pytest.raises(UsageError) as caught:
        check_new_file(path, "--report", overwrite, MARK)
    return caught.value


def test_a_new_file_may_be_written_also_to_a_new_folder(tmp_path: Path) -> None:
    check_new_file(tmp_path / "new.html", "--report", False, MARK)
    check_new_file(tmp_path / "a" / "b" / "new.html", "--report", False, MARK)
    assert list(tmp_path.iterdir()) == []


def test_only_a_file_of_ours_is_replaced_and_only_if_asked(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.html", tmp_path / "theirs.html"
    ours.write_text(f"<html>{MARK}</html>")
    theirs.write_text("<html>" + " " * 5000 + MARK)
    assert refused(ours, False).message == f"--report {ours} exists"
    assert "Add --overwrite" in refused(ours, False).hint
    check_new_file(ours, "--report", True, MARK)
    assert "which csulora did not write" in refused(theirs, True).message


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_file_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    os.mkfifo(tmp_path / "pipe.html")
    (tmp_path / "file").write_text(MARK)
    assert "not a regular file" in refused(tmp_path, overwrite).message
    assert "not a regular file" in refused(tmp_path / "pipe.html", overwrite).message
    assert "which is not a folder" in refused(tmp_path / "file" / "new.html", overwrite).message


def test_a_staged_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    with staged_file(path) as staging:
        staging.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("former")

    def interrupted() -> None:
        with staged_file(path) as staging:
            staging.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_of_a_link_the_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target.html").write_text("former")
    (tmp_path / "link.html").symlink_to("target.html")
    with staged_file(tmp_path / "link.html") as staging:
        staging.write_text("new")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "target.html").read_text() == "new"
