"""A device without enough memory: smaller chunks where the result is the same, else advice."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from zsq.errors import JobError

logger = logging.getLogger(__name__)
T = TypeVar("T")


def in_chunks(call: Callable[[slice], T], count: int, size: int, what: str) -> Iterator[tuple[slice, T]]:
    """What `call` gives for slices of `size` that tile 0 .. count; halved whenever the device has no room.

    For work on independent images, whose results do not depend on how they are grouped (but for rounding,
    where a device computes groups of another size in another order).

    Args:
        call: a slice -> its result.
        count: of images.
        size: of a slice, at first.
        what: is being done, for the message.

    Raises:
        JobError: there is no room for a single image.
    """
    start = 0
    while start < count:
        rows = slice(start, min(start + size, count))
        try:
            result = call(rows)
        except torch.OutOfMemoryError as error:
            if rows.stop - start == 1:
                raise JobError(
                    f"The device has too little memory: {what} fails for a single image."
                ) from error
        else:
            yield rows, result
            start = rows.stop
            continue
        # Not in the handler: the exception holds what the call had allocated.
        size = (rows.stop - start) // 2
        logger.info("The device ran out of memory: %s goes on with %d images at once.", what, size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def return_unused(device: torch.device | str) -> None:
    """Give a CUDA device back what no tensor of this process uses, for the other processes on it.

    PyTorch keeps it otherwise, and what recorded steps used is not even used again for other tensors.
    """
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def no_room(advice: str) -> Iterator[None]:
    """Running out of device memory becomes a JobError that says what to change; it changes the result."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise without_room(error, advice) from error


def without_room(error: torch.OutOfMemoryError, advice: str) -> JobError:
    """The error that takes the place of PyTorch's."""
    return JobError(f"The device ran out of memory ({said_of(error)}). {advice}")


def said_of(error: torch.OutOfMemoryError) -> str:
    """What was asked for and what was free, in PyTorch's words, without its list of processes."""
    first_line = (str(error).strip().splitlines() or ["no details"])[0]
    for list_begins in (" Process ", " Including "):
        first_line = first_line.partition(list_begins)[0]
    return first_line.rstrip(". ")
