"""The JSON file beside an exported one: how it compared, and how images are prepared for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from zsq.errors import JobError, UsageError
from zsq.files import write_atomic
from zsq.models import ModelSpec
from zsq.run import spec_from_json

T = TypeVar("T")
VERIFIED = "verified_on_own_images"  # how the file compared with the student, on images of the run


def account_of(file: Path) -> Path:
    """Where the account of a file is: its path with .json after it."""
    return file.with_name(f"{file.name}.json")


def to_bytes(account: dict[str, Any]) -> bytes:
    """What the account's file holds."""
    return (json.dumps(account, indent=2) + "\n").encode()


def write_with_account(file: Path, content: bytes, account: dict[str, Any]) -> None:
    """Write a file and its account; both or none.

    Raises:
        JobError: one of them cannot be written.
    """
    write_atomic(file, content)
    try:
        write_atomic(account_of(file), to_bytes(account))
    except JobError:
        file.unlink(missing_ok=True)
        raise


def read_account(file: Path, to: str, read: Callable[[dict[str, Any]], T]) -> tuple[dict[str, Any], T]:
    """The account of a file, and what `read` takes from it.

    Args:
        file: that was exported.
        to: by `zsq export --to` what, for the message.
        read: an account -> anything; fails with the errors of missing or wrong values.

    Raises:
        UsageError: there is none, or it is not one.
    """
    try:
        account = json.loads(account_of(file).read_text(encoding="utf-8"))
        return account, read(account)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{account_of(file)}, which says how the images of {file.name} are prepared, cannot be read "
            f"({error}). Export the run with zsq export RUN --to {to}."
        ) from error


def spec_in(account: dict[str, Any]) -> ModelSpec:
    """How images are prepared, as an account says."""
    return spec_from_json(json.loads(account["zsq.preprocessing"]))
