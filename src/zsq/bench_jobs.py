"""Rows of a benchmark in several worker processes: what waits for what, and who does it."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zsq.bench_plan import Job, Plan
from zsq.bench_row import Say, image_files
from zsq.errors import JobError, ZsqError


@dataclass(frozen=True, kw_only=True)
class Task:
    """A piece of a benchmark: "float" (a network's own accuracy), "images" or "row".

    Attributes:
        name: unique.
        kind: what is to be done.
        network: number of the plan.
        job: number of the job in the plan; None for "float".
        needs: names of tasks that must be done before.
    """

    name: str
    kind: str
    network: int
    job: int | None = None
    needs: tuple[str, ...] = ()


def tasks_of(plans: Sequence[Plan], floats: dict[str, Any], device: str, folder: Path) -> list[Task]:
    """What is left to do, in the order of the file; the images of a key are one task, whoever needs them."""
    tasks: dict[str, Task] = {}
    for network, plan in enumerate(plans):
        pending = [(number, job) for number, job in enumerate(plan.jobs) if job.cell not in plan.rows]
        for number, job in pending:
            needs = []
            if plan.float_key not in floats:
                needs.append(f"float-{plan.float_key}")
                tasks.setdefault(needs[0], Task(name=needs[0], kind="float", network=network))
            files = image_files(job, plan, device, folder)
            if files is not None and not all(file.exists() for file in files):
                name = f"images-{files[0].stem}"
                needs.append(name)
                tasks.setdefault(name, Task(name=name, kind="images", network=network, job=number))
            name = f"row-{network}-{number}"
            tasks[name] = Task(name=name, kind="row", network=network, job=number, needs=tuple(needs))
    return list(tasks.values())


Ask = Callable[[Task], Any]


def do_tasks(
    tasks: Sequence[Task],
    workers: Sequence[Ask],
    *,
    begun: Callable[[Task], None],
    ended: Callable[[Task, Any], None],
) -> None:
    """Do all tasks, the first that is ready next; one whose need failed fails with the same error.

    Args:
        tasks: needs before those that need them.
        workers: each does a task at a time, in a thread of this process, and returns its result.
        begun: called in the calling thread when a task is handed to a worker.
        ended: called there with a result, or with the ZsqError that took its place.
    """
    left, done, idle = list(tasks), dict[str, Any](), list(workers)
    names = {task.name for task in tasks}
    running: dict[Future[Any], tuple[Task, Ask]] = {}
    with ThreadPoolExecutor(len(workers)) as pool:
        while left or running:
            for task in list(left):
                needs = [name for name in task.needs if name in names]
                broken = [done[name] for name in needs if isinstance(done.get(name), ZsqError)]
                if broken:
                    left.remove(task)
                    done[task.name] = broken[0]
                    ended(task, broken[0])
                elif idle and all(name in done for name in needs):
                    left.remove(task)
                    worker = idle.pop(0)
                    begun(task)
                    running[pool.submit(worker, task)] = task, worker
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, worker = running.pop(future)
                idle.append(worker)
                try:
                    done[task.name] = future.result()
                except ZsqError as error:
                    done[task.name] = error
                ended(task, done[task.name])


@dataclass
class Worker:
    """A process that does tasks, started when it is first asked and again after it was lost.

    Attributes:
        command: file, folder, device and threads, see `zsq.bench_worker`.
        plans: of the benchmark.
        titles: of tasks by name.
        floats: accuracies of the networks themselves, by key.
        say: shown lines.
    """

    command: Sequence[str]
    plans: Sequence[Plan]
    titles: dict[str, str]
    floats: dict[str, Any]
    say: Say
    process: "subprocess.Popen[str] | None" = field(default=None, init=False)

    def __call__(self, task: Task) -> Any:
        """The result of a task.

        Raises:
            JobError: it failed, or the process was lost.
        """
        if self.process is None or self.process.poll() is not None:
            threads = self.command[-1]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "zsq.bench_worker", *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        plan = self.plans[task.network]
        job: Job | None = None if task.job is None else plan.jobs[task.job]
        content = {"kind": task.kind, "network": task.network, "job": task.job}
        content |= {"key": plan.float_key if job is None else job.key, "title": self.titles[task.name]}
        content |= {"float": self.floats.get(plan.float_key)}
        try:
            self.process.stdin.write(json.dumps(content) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                answer = json.loads(line)
                if "say" not in answer:
                    break
                self.say(answer["say"])
            else:
                raise BrokenPipeError
        except (OSError, ValueError) as error:
            code = self.end()
            raise JobError(
                f"The worker process ended with exit code {code}"
                f"{' (killed; was there too little memory?)' if code == -9 else ''}."
            ) from error
        if "error" in answer:
            raise JobError(answer["error"])
        return answer["result"]

    def end(self) -> int | None:
        """End the process; its exit code if there was one."""
        if self.process is None:
            return None
        process, self.process = self.process, None
        process.kill()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was still to be written to it
                if stream is not None:
                    stream.close()
        return process.wait()


def worker_commands(path: str | Path, folder: Path, device: str, jobs: int) -> list[list[str]]:
    """What each worker is told: the file, the folder, its device and its threads.

    With the device "cuda", workers take the CUDA devices in turn. The threads of this process are divided.
    """
    count = torch.cuda.device_count() if device == "cuda" else 0
    threads = max(1, torch.get_num_threads() // jobs)
    devices = [f"cuda:{number % count}" if count else device for number in range(jobs)]
    return [[str(path), str(folder), own, str(threads)] for own in devices]
