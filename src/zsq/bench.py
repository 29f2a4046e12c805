"""`zsq bench FILE.toml`: networks x recipes x bits x seeds -> table, resumable at any instant."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zsq.bench_file import read_bench
from zsq.bench_folder import TABLE, BenchFolder, check_outputs
from zsq.bench_jobs import Task, Worker, do_tasks, tasks_of, worker_commands
from zsq.bench_plan import Job, Plan, plan_network
from zsq.bench_row import Say, fill_row, measure
from zsq.errors import JobError, ZsqError
from zsq.resume import held


def run_bench(
    path: str | Path,
    *,
    out: str | Path | None = None,
    write: str | Path | None = None,
    jobs: int = 1,
    progress: Say,
) -> Path:
    """Fill the table of a benchmark file, row by row; rows that an earlier call finished are not done again.

    A row is done again if what it depends on has changed: its settings, weights or data. An interrupted row
    goes on from its last finished piece. Synthetic images are made once for all bits. A row that fails is
    noted, and the next one is done.

    Args:
        path: the benchmark file.
        out: folder for rows, images and the table; None means runs/bench-NAME.
        write: also write the Markdown table there.
        jobs: rows at a time, each in a process of its own with its part of the threads and, if the file says
            device = "cuda", the CUDA devices in turn; 1 does them in this process. The rows are the same.
        progress: called with one line for every step that is worth showing.

    Returns:
        The folder, with rows.jsonl, table.md and results.json.

    Raises:
        UsageError: the file, or a path or setting in it, is wrong (nothing was computed), or another process
            is at work on the folder.
        JobError: some rows failed; all others are done.
    """
    bench = read_bench(Path(path))
    folder = Path(out) if out is not None else Path("runs") / f"bench-{bench.name}"
    copy_at = Path(write) if write is not None else None
    check_outputs(folder, copy_at)
    plans = [plan_network(bench, network) for network in bench.networks]
    command = ["zsq", "bench", str(path), *(["--out", str(out)] if out is not None else [])]
    command += ["--write", str(write)] if write is not None else []
    with held(folder):
        found = BenchFolder(folder, bench, plans, shlex.join(command), copy_at)
        filling = _Filling(found, plans, bench.device, progress)
        progress(f"{bench.name}: {filling.total} rows, {filling.begun} of them finished before")
        if jobs > 1:
            filling.in_processes(Path(path), jobs)
        else:
            filling.here()
        failed = sum(len(plan.failures) for plan in plans)
        if failed:
            raise JobError(
                f"{failed} of {filling.total} rows failed; {folder / TABLE} says why. The other rows are "
                "done. The same command tries the failed ones again."
            )
        found.close()
    return folder


class _Filling:
    """Does what is left of a benchmark, and says so.

    Args:
        found: what there is already; rows are added.
        plans: of the networks.
        device: to compute on.
        progress: see `run_bench`.

    Attributes:
        total: number of rows.
        begun: how many of them have begun, or were finished before.
    """

    def __init__(self, found: BenchFolder, plans: Sequence[Plan], device: str, progress: Say) -> None:
        self._found, self._plans, self._device, self._progress = found, plans, device, progress
        self.total = sum(len(plan.jobs) for plan in plans)
        self.begun = sum(len(plan.rows) for plan in plans)
        self._titles: dict[str, str] = {}

    def here(self) -> None:
        """One row after another, in this process."""
        for plan in self._plans:
            pending = [job for job in plan.jobs if job.cell not in plan.rows]
            if pending and plan.float_key not in self._found.floats:
                self._progress(_title_of_float(plan))
                self._found.add_float(plan, measure(plan.teacher.module, plan, self._device))
            for job in pending:
                title = self._next_title(plan, job)
                row: dict[str, Any] | ZsqError
                try:
                    accuracy = self._found.floats[plan.float_key]
                    row = fill_row(job, plan, self._device, self._found.path, accuracy, title, self._progress)
                except ZsqError as error:
                    row = error
                self._finish(plan, job, title, row)
            plan.given = None

    def in_processes(self, path: Path, jobs: int) -> None:
        """Several rows of the file at `path` at a time."""
        left = self.total - self.begun
        if not left:
            return
        found, plans = self._found, self._plans
        commands = worker_commands(path, found.path, self._device, min(jobs, left))
        workers = [Worker(command, plans, self._titles, found.floats, self._progress) for command in commands]
        try:
            tasks = tasks_of(plans, found.floats, self._device, found.path)
            do_tasks(tasks, workers, begun=self._task_begun, ended=self._task_ended)
        finally:
            for worker in workers:
                worker.end()

    def _task_begun(self, task: Task) -> None:
        plan = self._plans[task.network]
        if task.job is None:
            title = _title_of_float(plan)
        elif task.kind == "images":
            title = f"{plan.network.name}: making the images of seed {plan.jobs[task.job].cell[2]}"
        else:
            title = self._next_title(plan, plan.jobs[task.job])
        self._titles[task.name] = title
        if task.kind != "row":
            self._progress(title)

    def _task_ended(self, task: Task, result: Any) -> None:
        plan = self._plans[task.network]
        if task.kind == "row" and task.job is not None:
            if task.name not in self._titles:  # it failed before it began
                self._task_begun(task)
            self._finish(plan, plan.jobs[task.job], self._titles[task.name], result)
        elif task.kind == "float" and not isinstance(result, ZsqError):
            self._found.add_float(plan, result)

    def _next_title(self, plan: Plan, job: Job) -> str:
        self.begun += 1
        label, bits, seed = job.cell
        return f"[{self.begun} of {self.total}] {plan.network.name}, {label}, {bits}, seed {seed}"

    def _finish(self, plan: Plan, job: Job, title: str, row: dict[str, Any] | ZsqError) -> None:
        if isinstance(row, ZsqError):
            self._found.add_failure(plan, job, row)
            self._progress(f"{title}: failed: {row}")
        else:
            self._found.add_row(plan, job, row)
            self._progress(f"{title}: top-1 {row['top1']:.2f} % (float {row['float']['top1']:.2f} %)")


def _title_of_float(plan: Plan) -> str:
    return f"{plan.network.name}: evaluating the float network"
