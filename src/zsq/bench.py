"""`zsq bench FILE.toml`: networks x recipes x bits x seeds -> table, resumable at any instant."""

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsq.bench_file import Bench, read_bench
from zsq.bench_jobs import Task, Worker, do_tasks, tasks_of, worker_commands
from zsq.bench_plan import Job, Plan, plan_network
from zsq.bench_row import IMAGES, WORK, Say, fill_row, is_complete, measure, work_folder
from zsq.bench_table import MARK, NetworkResults, summarise, to_markdown
from zsq.errors import JobError, UsageError, ZsqError
from zsq.files import write_atomic
from zsq.paths import check_output
from zsq.resume import held
from zsq.run_record import ACCURACY, NUMBER, TEXT, is_table_with, or_none, table_of

ROWS, FLOAT, TABLE, RESULTS = "rows.jsonl", "float.json", "table.md", "results.json"
# What the table needs of a finished row.
ROW = {
    "key": TEXT,
    "top1": NUMBER,
    "seconds": table_of(or_none(NUMBER)),
    "versions": table_of(TEXT),
    "machine": TEXT,
    "finished": TEXT,
}


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
    _check_outputs(folder, copy_at)
    plans = [plan_network(bench, network) for network in bench.networks]
    command = ["zsq", "bench", str(path), *(["--out", str(out)] if out is not None else [])]
    command += ["--write", str(write)] if write is not None else []
    with held(folder):
        return _fill_table(bench, plans, Path(path), folder, copy_at, command, jobs=jobs, progress=progress)


def _fill_table(
    bench: Bench,
    plans: list[Plan],
    path: Path,
    folder: Path,
    copy_at: Path | None,
    command: list[str],
    *,
    jobs: int,
    progress: Say,
) -> Path:
    """Do what is left of a benchmark; arguments and errors as for `run_bench`."""
    for leftover in (*folder.glob(".*.????????"), *(folder / IMAGES).glob(".*.????????")):
        leftover.unlink(missing_ok=True)  # of a killed write
    finished, floats = _read_rows(folder / ROWS), _read_floats(folder / FLOAT)
    for plan in plans:
        plan.rows = {
            job.cell: finished[job.key]
            for job in plan.jobs
            if job.key in finished and is_complete(finished[job.key], plan)
        }
    header = _header(bench, shlex.join(command))
    total, done = sum(len(plan.jobs) for plan in plans), sum(len(plan.rows) for plan in plans)
    progress(f"{bench.name}: {total} rows, {done} of them finished before")

    def tabulate() -> None:
        summary = summarise(header, [_results(bench, plan, floats.get(plan.float_key)) for plan in plans])
        write_atomic(folder / RESULTS, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
        for file in (folder / TABLE, copy_at):
            if file is not None:
                write_atomic(file, to_markdown(summary).encode())

    tabulate()

    def title_of(plan: Plan, job: Job) -> str:
        label, bits, seed = job.cell
        return f"[{done} of {total}] {plan.network.name}, {label}, {bits}, seed {seed}"

    def finish(plan: Plan, job: Job, title: str, row: dict[str, Any] | ZsqError) -> None:
        if isinstance(row, ZsqError):
            plan.failures[job.cell] = str(row)
            progress(f"{title}: failed: {row}")
        else:
            _append(folder / ROWS, row)
            plan.rows[job.cell] = row
            shutil.rmtree(work_folder(folder, job, plan), ignore_errors=True)
            progress(f"{title}: top-1 {row['top1']:.2f} % (float {row['float']['top1']:.2f} %)")
        tabulate()

    def note_float(plan: Plan, measured: dict[str, Any]) -> None:
        floats[plan.float_key] = measured
        write_atomic(folder / FLOAT, (json.dumps(floats, indent=2) + "\n").encode())

    def begun(task: Task) -> None:
        nonlocal done
        plan = plans[task.network]
        if task.job is None:
            titles[task.name] = f"{plan.network.name}: evaluating the float network"
        elif task.kind == "images":
            seed = plan.jobs[task.job].cell[2]
            titles[task.name] = f"{plan.network.name}: making the images of seed {seed}"
        else:
            done += 1
            titles[task.name] = title_of(plan, plan.jobs[task.job])
        if task.kind != "row":
            progress(titles[task.name])

    def ended(task: Task, result: Any) -> None:
        nonlocal done
        plan = plans[task.network]
        if task.kind == "row" and task.job is not None:
            if task.name not in titles:  # it failed before it began
                begun(task)
            finish(plan, plan.jobs[task.job], titles[task.name], result)
        elif task.kind == "float" and not isinstance(result, ZsqError):
            note_float(plan, result)

    titles: dict[str, str] = {}
    if jobs > 1 and done < total:
        commands = worker_commands(path, folder, bench.device, min(jobs, total - done))
        workers = [Worker(command, plans, titles, floats, progress) for command in commands]
        try:
            do_tasks(tasks_of(plans, floats, bench.device, folder), workers, begun=begun, ended=ended)
        finally:
            for worker in workers:
                worker.end()
    for plan in plans if jobs == 1 else ():
        pending = [job for job in plan.jobs if job.cell not in plan.rows]
        if pending and plan.float_key not in floats:
            progress(f"{plan.network.name}: evaluating the float network")
            note_float(plan, measure(plan.teacher.module, plan, bench.device))
        for job in pending:
            done += 1
            title = title_of(plan, job)
            row: dict[str, Any] | ZsqError
            try:
                row = fill_row(job, plan, bench.device, folder, floats[plan.float_key], title, progress)
            except ZsqError as error:
                row = error
            finish(plan, job, title, row)
        plan.given = None
    failed = sum(len(plan.failures) for plan in plans)
    if failed:
        raise JobError(
            f"{failed} of {total} rows failed; {folder / TABLE} says why. The other rows are done. The same "
            "command tries the failed ones again."
        )
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return folder


def _check_outputs(folder: Path, copy_at: Path | None) -> None:
    check_output(folder, "output")
    if copy_at is not None:
        check_output(copy_at, "table to write")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RESULTS).exists()):
        raise UsageError(
            f"The output {folder} exists and is not the folder of a benchmark; nothing in it was changed. "
            "Choose another --out."
        )
    if copy_at is not None and copy_at.exists():
        if not copy_at.is_file() or MARK not in copy_at.read_text(encoding="utf-8", errors="replace"):
            raise UsageError(
                f"{copy_at} exists and was not written by `zsq bench`; nothing in it was changed. Choose "
                "another --write."
            )


def _header(bench: Bench, command: str) -> dict[str, Any]:
    settings = {
        "budget": bench.budget,
        "ends": bench.ends,
        "seeds": list(bench.seeds),
        "device": bench.device,
        **({"diagnostics": bench.diagnostics} if bench.diagnostics else {}),
    }
    recipes = {
        entry.label: {"uses": entry.name, **entry.set, **({"images": "given"} if entry.images else {})}
        for entry in bench.recipes
    }
    return {
        "format": 1,
        "name": bench.name,
        "command": command,
        "settings": settings | bench.set,
        "recipes": recipes,
    }


def _results(bench: Bench, plan: Plan, float_accuracy: Mapping[str, Any] | None) -> NetworkResults:
    network = plan.network
    about = {key: getattr(network, key) for key in ("model", "weights", "data", "images")}
    return NetworkResults(
        name=network.name,
        settings={key: value for key, value in about.items() if value is not None} | network.set,
        recipes=[entry.label for entry in bench.recipes],
        bits=network.bits,
        seeds=bench.seeds,
        float_accuracy=float_accuracy,
        rows=plan.rows,
        failures=plan.failures,
    )


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Finished rows by key; lines that are damaged count as not finished, and the last of a key holds."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if is_table_with(row, ROW):
            rows[row["key"]] = row
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    before = path.read_bytes() if path.exists() else b""
    before += b"" if before.endswith(b"\n") or not before else b"\n"  # after a damaged line
    write_atomic(path, before + json.dumps(row, allow_nan=False).encode() + b"\n")


def _read_floats(path: Path) -> dict[str, Any]:
    """Accuracies of the networks themselves by key; what is damaged is measured again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found = content if isinstance(content, dict) else {}
    return {key: value for key, value in found.items() if is_table_with(value, ACCURACY)}
