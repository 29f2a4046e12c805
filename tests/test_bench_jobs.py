"""Rows in several processes: the same rows and table, images made once, lost workers told."""

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import nothing, rows, without_time, write_files

import zsq.cli
from zsq import bench_jobs
from zsq.bench import run_bench
from zsq.bench_jobs import Task, Worker, do_tasks, worker_commands
from zsq.bench_worker import why_failed
from zsq.errors import JobError
from zsq.out_of_memory import no_room


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_files(tmp_path)
    monkeypatch.setenv("BENCH_FILES", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    return tmp_path


def without_seconds(value: Any) -> Any:
    """A summary without what differs between two runs of the same benchmark."""
    if isinstance(value, dict):
        differs = ("seconds", "finished", "command")
        return {key: without_seconds(v) for key, v in value.items() if key not in differs}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def test_two_processes_fill_the_same_table(files: Path) -> None:
    run_bench(files / "small.toml", out=files / "one", progress=nothing)
    lines: list[str] = []
    run_bench(files / "small.toml", out=files / "out", jobs=2, progress=lines.append)
    text = (files / "one" / "rows.jsonl").read_text()
    expected = {row["key"]: without_time(row) for row in map(json.loads, text.splitlines())}
    found = rows(files)
    assert len(found) == 8 and {row["key"]: without_time(row) for row in found} == expected
    one, two = (json.loads((files / out / "results.json").read_text()) for out in ("one", "out"))
    assert without_seconds(one) == without_seconds(two)
    assert all(row["seconds"]["synthesize"] > 0 for row in found if row["recipe"] == "genie")
    making = [line for line in lines if "making the images" in line]
    assert sorted(making) == [f"tiny net: making the images of seed {seed}" for seed in (0, 1)]
    assert sum("top-1" in line for line in lines) == 8
    assert any("[8 of 8]" in line for line in lines) and not (files / "out" / "work").exists()
    # one row is missing, and its images: only they are made
    path = files / "out" / "rows.jsonl"
    lost = next(row["key"] for row in found if row["recipe"] == "genie")  # rows end in any order
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["key"] != lost]
    path.write_text("\n".join(kept) + "\n")
    shutil.rmtree(files / "out" / "images")
    lines.clear()
    run_bench(files / "small.toml", out=files / "out", jobs=2, progress=lines.append)
    assert len([line for line in lines if "making the images" in line]) == 1
    assert {row["key"]: without_time(row) for row in rows(files)} == expected


def test_a_lost_worker_is_told_and_another_goes_on(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = files / "small.toml"
    toml.write_text(toml.read_text().replace("seeds = [0, 1]", "seeds = [0]"))
    original, lost = Worker.__call__, threading.Lock()

    def ask_then_kill(self: Worker, task: Task) -> Any:
        if task.kind == "row" and task.job == 0 and lost.acquire(blocking=False):
            assert self.process is not None and self.process.stdin is not None
            write = self.process.stdin.write

            def killed(text: str) -> int:
                assert self.process is not None
                self.process.kill()
                return write(text)

            monkeypatch.setattr(self.process.stdin, "write", killed)
        return original(self, task)

    monkeypatch.setattr(Worker, "__call__", ask_then_kill)
    with pytest.raises(JobError, match="1 of 4 rows failed"):
        run_bench(toml, out=files / "out", jobs=2, progress=nothing)
    text = (files / "out" / "table.md").read_text()
    assert "The worker process ended with exit code -9 (killed; was there too little memory?)." in text
    assert len(rows(files)) == 3


def test_the_command(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as caught:
        zsq.cli.main(["bench", str(files / "small.toml")])
    assert caught.value.code == 2 and "give it --jobs N, without torchrun" in capsys.readouterr().err


# ---- the order of tasks


def task(name: str, *needs: str) -> Task:
    return Task(name=name, kind="row", network=0, job=0, needs=needs)


def test_nothing_begins_before_what_it_needs() -> None:
    tasks = [task("images"), task("a", "images"), task("b", "images"), task("c")]
    events: list[str] = []
    images_made, c_done = threading.Event(), threading.Event()

    def worker(one: Task) -> str:
        if one.name == "images":
            assert c_done.wait(10)  # meanwhile another row is done
            images_made.set()
        elif one.name == "c":
            c_done.set()
        else:
            assert images_made.is_set()
        return one.name.upper()

    do_tasks(
        tasks,
        [worker, worker],
        begun=lambda one: events.append(one.name),
        ended=lambda one, result: events.append(result),
    )
    assert events[:2] == ["images", "c"] and set(events) == {*"abcABC", "images", "IMAGES"}


def test_what_needs_something_that_failed_fails_with_it() -> None:
    ended: dict[str, Any] = {}
    asked: list[str] = []

    def worker(one: Task) -> str:
        asked.append(one.name)
        if one.name == "images":
            raise JobError("diverged")
        return "done"

    tasks = [task("images"), task("a", "images"), task("b")]
    do_tasks(
        tasks, [worker], begun=lambda one: None, ended=lambda one, result: ended.update({one.name: result})
    )
    assert asked == ["images", "b"] and ended["b"] == "done"
    assert str(ended["a"]) == str(ended["images"]) == "diverged"


def test_devices_and_threads_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_jobs.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = worker_commands("f.toml", tmp_path, "cuda", 3)
    assert [command[2:] for command in found] == [["cuda:0", "2"], ["cuda:1", "2"], ["cuda:0", "2"]]
    assert [c[2:] for c in worker_commands("f.toml", tmp_path, "cuda:1", 9)] == [["cuda:1", "1"]] * 9


def test_a_worker_without_room_asks_for_fewer_of_them() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB. Process 1 has 5 GiB.")
    expected = "The device ran out of memory (CUDA out of memory. Tried to allocate 2 MiB). Fewer --jobs"
    assert why_failed(full).startswith(expected)
    with pytest.raises(JobError) as caught, no_room("Lower it."):
        raise full
    assert why_failed(caught.value).endswith("Lower it. Fewer --jobs leave more to each.")
    assert why_failed(JobError("Lost.")) == "Lost." and why_failed(KeyError("a")) == "KeyError('a')"
