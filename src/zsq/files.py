"""Files that are whole at any instant, and refusing to write where something is."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from zsq.errors import JobError, UsageError
from zsq.paths import check_output


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that at any instant it is the old one or the new one (temporary file, fsync, rename).

    Raises:
        JobError: the disk is full or the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise JobError(
            f"{path} could not be written: {error.strerror or error}. What was finished before is kept; "
            f"{'free some space' if full else 'make the folder writable'} or choose another --out, then give "
            "the same command again."
        ) from error


def check_free(files: Sequence[Path], *, force: bool) -> None:
    """Refuse to write where something is.

    Raises:
        UsageError: one of the files exists and `force` is False, or it is a folder.
    """
    for existing in files:
        check_output(existing, "output")
        if existing.is_dir() or (existing.exists() and not force):
            raise UsageError(
                f"{existing} exists already; nothing was changed. Choose another --out"
                + ("." if existing.is_dir() else ", or give --force to replace it.")
            )
