"""What one process of a job does; `python distributed_job.py NAME FOLDER` with the variables of torchrun."""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from quantization_networks import Residual, images, teacher

import zsq
from zsq import process_watch
from zsq.distributed import ALONE, Group, joined
from zsq.errors import JobError, UsageError
from zsq.pipeline import quantize
from zsq.progress import Progress

TINY: dict[str, Any] = {
    "synthesis.num_images": 23,  # batches of 8, 8 and 7
    "synthesis.batch_size": 8,
    "synthesis.steps": 3,
    "synthesis.latent_size": 8,
    "num_holdout": 4,
    "reconstruction.steps": 6,
    "reconstruction.batch_size": 7,  # shares of 3 and 4, and of 2, 2 and 3
}


def tiny(out: Path, group: Group = ALONE, **options: Any) -> zsq.Run:
    model = teacher(Residual)
    return quantize(
        model, recipe="genie", bits="W3A3", overrides=TINY, seed=3, out=out, group=group, **options
    )


def measured(run: zsq.Run, group: Group = ALONE) -> dict[str, Any]:
    """Accuracy on labelled images, of which every process reads its own; the second batch is the last."""
    x = images(90, seed=5)
    batches = [(x[:50], torch.arange(50) % 7), (x[50:], torch.arange(40) % 7)]
    return zsq.accuracy(run.student, batches[group.rank :: group.size], group=group).to_json()


def die_in_reconstruction(event: Progress) -> None:
    if event.stage == "reconstruct" and event.done > 6:
        os.kill(os.getpid(), signal.SIGKILL)


def whole(folder: Path, group: Group) -> None:
    """A run and its accuracy; then one in which the last process is killed."""
    run = tiny(folder / "run", group)
    accuracy = measured(run, group)
    group.first(lambda: (folder / "accuracy.json").write_text(json.dumps(accuracy)))
    progress = die_in_reconstruction if group.rank == group.size - 1 else lambda event: None
    tiny(folder / "killed", group, progress=progress)


def goes_on(folder: Path, group: Group) -> None:
    """The run that was killed, continued; then one process freezes."""
    seen: list[Progress] = []
    tiny(folder / "killed", group, progress=seen.append)
    resumed = [event.item for event in seen if event.resumed and event.stage != "holdout"]
    group.first(lambda: (folder / "resumed.json").write_text(json.dumps(resumed)))
    if group.rank == 1:
        (folder / "frozen").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    group.exchange(b"")


def small_things(folder: Path, group: Group) -> None:
    """The collectives one by one; at last an error of process 1."""
    assert group.exchange(b"ab" * group.rank) == [b"ab" * r for r in range(group.size)]
    a, b = torch.tensor([1.0, 2.0]), torch.tensor(3.0 + group.rank)
    group.add([a, b])
    assert a.tolist() == [2.0, 4.0] and b.item() == 7.0
    assert group.first(lambda: "x") == ("x" if group.rank == 0 else None)
    for kind in (UsageError, JobError):

        def fail(kind: Any = kind) -> None:
            raise kind("no")

        try:
            group.first(fail)
        except kind as error:
            assert str(error) == "no"
        else:
            raise AssertionError
    (folder / f"passed-{group.rank}").touch()
    if group.rank == 1:
        raise JobError("the disk is on fire")
    group.exchange(b"")


if __name__ == "__main__":
    torch.set_num_threads(1)
    process_watch.BEAT_SECONDS = 0.2
    process_watch.SILENCE_SECONDS = 10.0  # also on a busy machine, no process is that slow
    name, folder = sys.argv[1], Path(sys.argv[2])
    try:
        with joined() as joint:
            {"whole": whole, "goes_on": goes_on, "small_things": small_things}[name](folder, joint)
    except JobError as failure:
        if any(thread.name == "zsq-watch" for thread in threading.enumerate()):
            sys.exit("the watch outlives the group, and may abort the interpreter as it ends")
        sys.exit(f"rank {os.environ['RANK']}: {failure}")
