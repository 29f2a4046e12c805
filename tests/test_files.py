"""Files that are the old one or the new one at any instant."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from zsq.errors import JobError
from zsq.files import write_atomic


def test_write_atomic_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("function", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(
    function: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        if isinstance(error, OSError):
            with pytest.raises(JobError, match=r"could not be written: No space left on device\.") as caught:
                write_atomic(path, b"new")
            assert str(path) in str(caught.value) and caught.value.exit_code == 1
        else:
            with pytest.raises(KeyboardInterrupt):
                write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_a_job_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(JobError, match="could not be written"):
        write_atomic(tmp_path / "file" / "inside", b"new")
