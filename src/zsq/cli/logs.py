"""Losses written elsewhere while a job runs: `--log tensorboard`."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zsq.errors import UsageError, import_extra
from zsq.progress import Callback, Progress, silent

TENSORBOARD = "tensorboard"  # the folder in a run folder, the package, and the extra that brings it


@contextmanager
def logged(kind: str | None, folder: Path) -> Iterator[Callback]:
    """A callback that writes the values of every event as scalars STAGE/VALUE, in RUN/tensorboard.

    The folder is made with the first event, when the run has claimed its own. None logs nothing.

    Raises:
        UsageError: another kind, or the package is missing.
    """
    if kind is None:
        yield silent
        return
    if kind != TENSORBOARD:
        raise UsageError(f"--log is {TENSORBOARD}, got {kind!r}.")
    import_extra(TENSORBOARD, TENSORBOARD)
    module: Any = importlib.import_module("torch.utils.tensorboard")
    writers: list[Any] = []

    def write(event: Progress) -> None:
        if event.values and not writers:
            writers.append(module.SummaryWriter(str(folder / TENSORBOARD)))
        for name, value in event.values.items():
            writers[0].add_scalar(f"{event.stage}/{name}", value, event.done)

    try:
        yield write
    finally:
        for writer in writers:
            writer.close()


def both(first: Callback, second: Callback) -> Callback:
    """Tell two callbacks, in this order."""

    def tell(event: Progress) -> None:
        first(event)
        second(event)

    return tell
