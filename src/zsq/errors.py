"""Errors that reach the user: one paragraph that says what came, what was expected and what to do."""

import importlib
from types import ModuleType


class ZsqError(Exception):
    """Base of the errors that zsq raises on purpose; the command line prints only their text."""

    exit_code = 1


class JobError(ZsqError):
    """The call was right but the job could not be done."""


class UsageError(ZsqError, ValueError):
    """The call was wrong: a bad argument, file or model."""

    exit_code = 2


def one_line(error: BaseException, *, limit: int | None = None) -> str:
    """What an error says, on one line, without a full stop, of `limit` characters; its type if nothing."""
    return " ".join(str(error).split())[:limit].rstrip(".") or type(error).__name__


def import_extra(module: str, extra: str) -> ModuleType:
    """Import `module`, which the optional dependency `extra` brings.

    Raises:
        UsageError: it is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UsageError(
            f"This needs the package {module.split('.')[0]!r}, which is not installed. "
            f"Install the extra that brings it: pip install 'zsq[{extra}]'"
        ) from None
