"""A worker process of `zsq bench --jobs N`: tasks as JSON lines on stdin, answers on stdout.

A task is answered by any number of {"say": text} and one {"result": ...} or {"error": text}.
"""

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from zsq.bench_file import read_bench
from zsq.bench_plan import Plan, plan_network
from zsq.bench_row import fill_row, make_images, measure
from zsq.errors import JobError
from zsq.out_of_memory import return_unused, without_room

FEWER = "Fewer --jobs leave more to each."


def main() -> None:
    """Do tasks until stdin ends: python -m zsq.bench_worker FILE FOLDER DEVICE THREADS."""
    path, folder, device, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a user's model file prints is no answer
    torch.set_num_threads(int(threads))
    bench = read_bench(Path(path))
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()
    plan: tuple[int, Plan] | None = None

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    while True:
        task = json.loads(tasks.get())
        try:
            if plan is None or plan[0] != task["network"]:  # one network at a time is kept
                plan = task["network"], plan_network(bench, bench.networks[task["network"]])
            result = _do(task, plan[1], device, Path(folder), lambda line: answer(say=line))
        except KeyboardInterrupt:
            return
        except Exception as error:
            answer(error=why_failed(error))
        else:
            answer(result=result)
        return_unused(device)


def why_failed(error: Exception) -> str:
    """What is told of a task that failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return str(without_room(error, FEWER))
    text = str(error) if isinstance(error, ValueError | JobError) else repr(error)
    return f"{text} {FEWER}" if isinstance(error.__cause__, torch.OutOfMemoryError) else text


def _do(task: dict[str, Any], plan: Plan, device: str, folder: Path, say: Any) -> Any:
    job = None if task["job"] is None else plan.jobs[task["job"]]
    if task["key"] != (plan.float_key if job is None else job.key):
        raise JobError("The benchmark's file, weights or data changed meanwhile. Start it again.")
    if job is None:
        return measure(plan.teacher.module, plan, device)
    if task["kind"] == "images":
        return make_images(job, plan, device, folder, task["title"], say)
    return fill_row(job, plan, device, folder, task["float"], task["title"], say)


def _read(tasks: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)  # the benchmark ended, perhaps while a task is in work


if __name__ == "__main__":
    main()
