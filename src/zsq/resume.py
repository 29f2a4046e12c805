"""Which run a folder holds, and what of it is finished."""

import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zsq._version import __version__
from zsq.distributed import Group
from zsq.errors import JobError, UsageError
from zsq.models import Teacher
from zsq.paths import check_output
from zsq.recipe import Recipe
from zsq.recipe_fields import describe
from zsq.run import (
    FORMAT,
    STATE,
    Run,
    claim_folder,
    is_run_folder,
    load_run,
    read_record,
    temporary_files,
    write_record,
)
from zsq.state import State, StateFolder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# How the names of finished pieces begin: of images that no student had a part in, and of fine-tuning.
IMAGES_ALONE = ("synthesis-", "centres-", "generator", "holdout", "text-")
TUNED = "fine-tuning"


def identity_of(
    job: str,
    teacher: Teacher,
    settings: Recipe,
    images: Tensor | None,
    seed: int,
    device: torch.device,
    *,
    labels: Tensor | None = None,
) -> dict[str, Any]:
    """Everything that the resulting bits depend on; only a run of the same identity continues a folder.

    `images` and `labels` are those that the user gave.
    """
    identity = {
        "job": job,
        "bits": settings.scheme.bits,
        "seed": seed,
        "device": device.type,
        "model": {
            "name": teacher.name,
            "source": asdict(teacher.source),
            "sha256": teacher.sha256,
            "spec": asdict(teacher.spec),
            "parameters": sum(p.numel() for p in teacher.module.parameters()),
        },
        "given_images_sha256": _sha256(images),
        "given_labels_sha256": _sha256(labels),
        "recipe": describe(settings),
        "versions": {
            "zsq": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    result: dict[str, Any] = json.loads(json.dumps(identity))
    return result


def _sha256(tensor: Tensor | None) -> str | None:
    """Of a tensor's values on the CPU, in order."""
    if tensor is None:
        return None
    return hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).hexdigest()


def finished_run(
    folder: Path | None, identity: dict[str, Any], *, force: bool, command: str | None
) -> Run | None:
    """The run that the same command has finished in `folder`, if it was killed after that or is given again.

    Raises:
        UsageError: the run is damaged, or another process is at work on it.
    """
    if folder is None or force or command is None or not is_run_folder(folder):
        return None
    record = read_record(folder)
    if record.get("status") != "done" or record.get("command") != command:
        return None
    if any(record.get(key) != value for key, value in identity.items()):
        return None
    run = load_run(folder)
    with held(folder), suppress(OSError):  # a folder that is only read keeps what a killed process left
        shutil.rmtree(folder / STATE, ignore_errors=True)
        for path in temporary_files(folder):
            path.unlink(missing_ok=True)
    logger.info("This command has finished already: %s is as it was.", folder)
    return run


@contextmanager
def open_state(
    folder: Path | None, identity: dict[str, Any], *, force: bool, command: str | None, group: Group
) -> Iterator[State]:
    """The state of the run in `folder`: that of an interrupted run of the same identity, or a fresh one.

    With `force` also of one whose learning alone differs; pieces that depend on it are removed.

    Process 0 keeps it on disk, and the folder for itself; the others have a copy. Without a folder the state
    is empty and kept nowhere.

    Raises:
        UsageError: the folder holds something else, or another process is at work on it.
        JobError: it cannot be written.
    """
    if folder is None:
        yield {}
        return
    with ExitStack() as stack:
        group.first(lambda: stack.enter_context(held(folder)))
        state = group.first(lambda: _state_on_disk(folder, identity, force=force, command=command))
        yield group.pieces_of_first({} if state is None else state)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder for this process; the operating system gives it back when the process ends, however.

    Raises:
        UsageError: another process has it.
    """
    check_output(folder, "output folder")
    if fcntl is None or folder.is_file():
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # claiming the folder says what is wrong with it
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another process is at work on {folder}. Wait for its end, stop it, or choose another --out."
            ) from error
        except OSError as error:  # a file system without locks
            logger.debug("%s cannot be locked: %s", folder, error)
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):
            for path in missing:
                path.rmdir()  # only if nothing was written


def _state_on_disk(folder: Path, identity: dict[str, Any], *, force: bool, command: str | None) -> State:
    record: dict[str, Any] = {}
    if is_run_folder(folder):
        try:
            record = read_record(folder)
        except UsageError:
            if not force:
                raise
    if record.get("status") == "running":
        different = [key for key in identity if record.get(key) != identity[key]]
        if not different:  # also with `force`: the command that is continued may have had it
            try:
                for path in temporary_files(folder):
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise JobError(
                    f"The run in {folder} cannot go on: {error.strerror or error}. Nothing was changed; "
                    "make the folder writable, then give the same command again."
                ) from error
            return StateFolder(folder / STATE)
        if force and different == ["recipe"]:
            pieces = StateFolder(folder / STATE)
            stale = _stale_pieces(record["recipe"], identity["recipe"], pieces)
            if stale is not None:
                for name in stale:
                    del pieces[name]
                write_record(folder, {"format": FORMAT, "status": "running", "command": command, **identity})
                return pieces
        if not force:
            own = f" ({record['command']})" if record.get("command") else ""
            raise UsageError(
                f"{folder} holds an unfinished run that differs in: {', '.join(different)}. Nothing was "
                f"changed. Continue it with its own call{own}, choose another --out, or replace it with "
                "--force."
            )
    claim_folder(folder, force=force)
    write_record(folder, {"format": FORMAT, "status": "running", "command": command, **identity})
    return StateFolder(folder / STATE)


def _stale_pieces(before: Any, after: dict[str, Any], pieces: Iterable[str]) -> list[str] | None:
    """Finished pieces that depend on what differs between two recipes; None if all do, or may.

    Only where the learning alone differs, which nothing before the student depends on.
    """
    if not isinstance(before, dict):
        return None
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    if changed == {"fine_tuning"}:
        return [name for name in pieces if name.startswith(TUNED)]
    if changed <= {"reconstruction", "fine_tuning"}:
        return [name for name in pieces if not name.startswith(IMAGES_ALONE)]
    return None
