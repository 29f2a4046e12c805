"""Paths as a user writes them: refused where nothing can be, before anything else is asked of them."""

from pathlib import Path

from zsq.errors import UsageError


def user_path(text: str | Path, what: str) -> Path:
    """The path that `text` stands for, with ~ for the home folder; nothing need be there.

    Raises:
        UsageError: it cannot be looked at: a name that is too long or holds a zero byte, links in a circle,
            an unknown user's home, a folder that may not be searched.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"The {what} {text} begins with a home folder that is not known.") from error
    _look_at(path, what)
    return path


def check_output(path: Path, what: str) -> None:
    """Refuse a place where nothing can be written.

    Raises:
        UsageError: as for `user_path`, or it lies below a file.
    """
    _look_at(path, what)
    for parent in path.parents:
        if parent.is_file():
            raise UsageError(f"The {what} {path} lies below {parent}, which is a file. Choose another place.")


def _look_at(path: Path, what: str) -> None:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"The {what} {path} cannot be reached: {reason}. Check how it is written, and its permissions."
        ) from error
