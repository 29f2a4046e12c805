"""Several processes that do one job, as torchrun starts them: who does what, and how results reach all.

Every process runs the same code. Work is either the same everywhere, or shared out by rank and exchanged.
Process 0 alone writes files and speaks. A process that ends or freezes ends the others with a message.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from zsq.errors import JobError, UsageError, ZsqError
from zsq.process_watch import AGAIN, ProcessWatch

T = TypeVar("T")
Pieces = MutableMapping[str, dict[str, Tensor]]

JOIN_SECONDS = 300  # until all processes have found one another
# A process may wait for another one's whole batch of images: not this time but the silence ends the wait.
WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Group:
    """The processes of a job; one alone by default, for which everything here is trivial.

    Attributes:
        rank: of this process, 0 .. size - 1.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1
    watch: ProcessWatch | None = field(default=None, repr=False, compare=False)

    def share(self, count: int) -> slice:
        """This process's part of `count` things in a row; the parts differ by at most one in length."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors (same shapes in all processes) by their sums over the processes; in one message."""
        if self.size == 1 or not tensors:
            return
        joint = torch.cat([t.reshape(-1) for t in tensors])
        with self._together():
            dist.all_reduce(joint)
        for tensor, part in zip(tensors, joint.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def exchange(self, content: bytes) -> list[bytes]:
        """What every process passed here, in order of rank."""
        if self.size == 1:
            return [content]
        sizes = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        found = []
        with self._together():
            dist.all_gather(sizes, torch.tensor(len(content)))
            for source, size in enumerate(map(int, sizes)):
                own = source == self.rank
                part = bytearray(content) if own else bytearray(size)
                if size:
                    dist.broadcast(torch.frombuffer(part, dtype=torch.uint8), source)
                found.append(content if own else bytes(part))
        return found

    def first(self, call: Callable[[], T]) -> T | None:
        """Process 0 makes the call, the others wait and get None.

        Raises:
            ZsqError: what the call raised, in all processes.
        """
        if self.size == 1:
            return call()
        result, report = None, {}
        if self.rank == 0:
            try:
                result = call()
            except ZsqError as error:
                report = {"error": str(error), "usage": isinstance(error, UsageError)}
        report = json.loads(self.exchange(json.dumps(report).encode())[0])
        if report:
            raise (UsageError if report["usage"] else JobError)(report["error"])
        return result

    def pieces_of_first(self, pieces: Pieces) -> Pieces:
        """The finished pieces that process 0 has, for all; what others add, only they keep."""
        if self.size == 1:
            return pieces
        own = self.rank == 0
        names = [name for name in pieces if name in pieces] if own else []
        names = json.loads(self.exchange(json.dumps(names).encode())[0])
        found = {name: load(self.exchange(_packed(pieces[name]) if own else b"")[0]) for name in names}
        return pieces if own else found

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Collective communication; its failure means that another process is gone."""
        try:
            yield
        except RuntimeError as error:
            reason = self.watch.reason() if self.watch is not None else None
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = reason or f"The connection to another process of the job was lost ({first_line})."
            raise JobError(f"{reason} {AGAIN}") from error


ALONE = Group()


def spread(
    names: Sequence[str],
    make: Callable[[int], dict[str, Tensor]],
    finished: Pieces,
    group: Group,
    complete: Callable[[dict[str, Tensor]], bool] = bool,
) -> None:
    """Make the pieces that are missing in `finished`, in turns of one a process; all get all of them.

    Of `missing` pieces, process r makes numbers r, r + size, r + 2 size ...

    Args:
        names: of all pieces.
        make: number of a piece -> the piece.
        finished: pieces by name; a process adds its own once it is made, those of others after the turn.
        group: the processes.
        complete: whether a finished piece has all that it should; if not, it is made again.
    """
    missing = [i for i, name in enumerate(names) if name not in finished or not complete(finished[name])]
    for start in range(0, len(missing), group.size):
        turn = missing[start : start + group.size]
        own = turn[group.rank] if group.rank < len(turn) else None
        packed = b""
        if own is not None:
            piece = make(own)
            finished[names[own]] = piece
            packed = _packed(piece) if group.size > 1 else b""
        for index, content in zip(turn, group.exchange(packed), strict=False):
            if index != own:
                finished[names[index]] = load(content)


def _packed(piece: dict[str, Tensor]) -> bytes:
    return save({name: t.detach().cpu().contiguous() for name, t in piece.items()})


def started_by_torchrun() -> bool:
    """Whether the environment says that this process is one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def local_device(device: str) -> str:
    """This process's device of a kind: "cuda" -> "cuda:1" for the second process of a machine.

    Raises:
        UsageError: a single device is named, or the machine has fewer than processes.
    """
    if device == "cpu" or not started_by_torchrun():
        return device
    local, count = int(os.environ.get("LOCAL_RANK") or 0), torch.cuda.device_count()
    if device != "cuda":
        raise UsageError(
            f"--device {device} names one device for several processes. Give --device cuda: each takes one."
        )
    if local >= count:
        raise UsageError(
            f"A machine with {count} CUDA devices was given process number {local + 1}. Give torchrun "
            f"--nproc-per-node {count}: a process takes a device."
        )
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@contextmanager
def joined() -> Iterator[Group]:
    """The group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, as torchrun sets them.

    Messages go over gloo, those between CUDA tensors over NCCL. While it lasts, SIGTERM (torchrun's, when
    another process has failed) raises a JobError, and a process without a sign of life for two minutes ends
    the others with exit code 1 and a message to the logger "zsq".

    Raises:
        JobError: the processes did not find one another.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=JOIN_SECONDS)))
        dist.init_process_group(
            backend, store=PrefixStore("zsq", store), rank=rank, world_size=size, timeout=WAIT
        )
        watch = ProcessWatch(rank, size)
    except (RuntimeError, OSError) as error:
        raise JobError(
            f"The {size} processes of the job did not find one another within {JOIN_SECONDS} seconds at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}. Are all of them started, with "
            "the same address?"
        ) from error
    group = Group(rank, size, watch)
    try:
        with _terminated_is_an_error(watch):
            yield group
            group.exchange(b"")  # nobody leaves before all are done
    except BaseException as error:
        watch.report(error)
        raise
    finally:
        watch.stop()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


@contextmanager
def _terminated_is_an_error(watch: ProcessWatch) -> Iterator[None]:
    def terminated(*_: Any) -> None:
        told = "The job was told to end (SIGTERM): another process was lost, or someone stopped it."
        raise JobError(f"{watch.reason() or told} {AGAIN}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
