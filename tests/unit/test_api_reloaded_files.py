"""Files that the api reads again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.api.reloaded_files import ReloadedFiles


def files_of(path: Path) -> ReloadedFiles[int]:
    return ReloadedFiles([str(path)], lambda: int(path.read_text()))


def test_a_file_is_read_once_it_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("1")
    files = files_of(path)
    assert [files.poll(), files.value] == [False, 1]
    for number in ("20", "300"):
        # It changes before each look, so somebody is still writing.
        path.write_text(number)
        assert not files.poll()
    assert [files.poll(), files.value] == [True, 300]
    assert not files.poll()


def test_a_file_that_another_one_replaces_has_changed(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_text("1")
    files = files_of(path)
    other.write_text("2")
    # As a copy with its times, or a mounted secret.
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert [files.poll(), files.poll(), files.value] == [False, True, 2]


def test_a_bad_file_is_a_problem_until_it_is_good_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("1")
    files = files_of(path)
    path.write_text("x")
    assert [files.poll(), files.poll(), files.poll(), files.value] == [False, False, False, 1]
    assert "what was read before holds" in files.problem
    path.unlink()
    assert [files.poll(), files.poll(), files.value] == [False, False, 1]
    assert "No such file" in files.problem
    path.write_text("2")
    assert [files.poll(), files.poll(), files.value, files.problem] == [False, True, 2, ""]


def test_a_bad_file_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        files_of(tmp_path / "nowhere")
