"""The folder of a benchmark: finished rows, accuracies of the networks themselves, and the table of both."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zsq.bench_file import Bench
from zsq.bench_plan import Job, Plan
from zsq.bench_row import IMAGES, WORK, is_complete, work_folder
from zsq.bench_table import MARK, NetworkResults, summarise, to_markdown
from zsq.errors import UsageError, ZsqError
from zsq.files import write_atomic
from zsq.paths import check_output
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


class BenchFolder:
    """What a benchmark has found so far; every change is on the disk, table included, when a method returns.

    Finished rows are taken over into the plans as it is made, and what killed writes left is removed.

    Args:
        path: the folder, held by this process.
        bench: the benchmark.
        plans: of its networks; their rows and failures are filled.
        command: that the table names.
        copy_at: where the table is written too, or None.

    Attributes:
        path: as above.
        floats: accuracies of the networks themselves, by `Plan.float_key`.
    """

    def __init__(
        self, path: Path, bench: Bench, plans: Sequence[Plan], command: str, copy_at: Path | None
    ) -> None:
        self.path, self._bench, self._plans = path, bench, plans
        self._header, self._copy_at = _header(bench, command), copy_at
        for leftover in (*path.glob(".*.????????"), *(path / IMAGES).glob(".*.????????")):
            leftover.unlink(missing_ok=True)  # of a killed write
        self.floats = _read_floats(path / FLOAT)
        finished = _read_rows(path / ROWS)
        for plan in plans:
            plan.rows = {
                job.cell: finished[job.key]
                for job in plan.jobs
                if job.key in finished and is_complete(finished[job.key], plan)
            }
        self._tabulate()

    def add_row(self, plan: Plan, job: Job, row: dict[str, Any]) -> None:
        """Keep a finished row, and nothing of the work on it."""
        _append(self.path / ROWS, row)
        plan.rows[job.cell] = row
        shutil.rmtree(work_folder(self.path, job, plan), ignore_errors=True)
        self._tabulate()

    def add_failure(self, plan: Plan, job: Job, error: ZsqError) -> None:
        """Let the table say why a row failed; the next call tries it again."""
        plan.failures[job.cell] = str(error)
        self._tabulate()

    def add_float(self, plan: Plan, accuracy: dict[str, Any]) -> None:
        """Keep the accuracy of a network itself."""
        self.floats[plan.float_key] = accuracy
        write_atomic(self.path / FLOAT, (json.dumps(self.floats, indent=2) + "\n").encode())

    def close(self) -> None:
        """Remove what only unfinished rows need."""
        shutil.rmtree(self.path / WORK, ignore_errors=True)

    def _tabulate(self) -> None:
        results = [_results(self._bench, plan, self.floats.get(plan.float_key)) for plan in self._plans]
        summary = summarise(self._header, results)
        content = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.path / RESULTS, content.encode())
        for file in (self.path / TABLE, self._copy_at):
            if file is not None:
                write_atomic(file, to_markdown(summary).encode())


def check_outputs(folder: Path, copy_at: Path | None) -> None:
    """Refuse to write where something else is.

    Raises:
        UsageError: so.
    """
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
