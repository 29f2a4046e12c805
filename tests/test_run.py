"""The run folder: saving, loading and claiming."""

import errno
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_networks import SIZE, Residual, attached, images
from tiny_networks import message

from zsq.errors import JobError
from zsq.models import ModelSpec
from zsq.quant.calibrate import calibrate
from zsq.recipe import Calibration
from zsq.run import FORMAT, Run, claim_folder, is_run_folder, load_run
from zsq.state import StateFolder

FILES = {"run.json", "student.safetensors", "images.safetensors", "images.png", "metrics.jsonl"}


def finished_run() -> Run:
    _, student, _, _ = attached(Residual, "W3A3")
    calibrate(student, [images(8)], Calibration())
    spec = ModelSpec(input_size=SIZE, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_fraction=1.0)
    record: dict[str, Any] = {
        "format": FORMAT,
        "status": "done",
        "command": "zsq quantize x",
        "bits": "W3A3",
        "seed": 0,
        "device": "cpu",
        "model": {
            "name": "residual",
            "source": {"kind": "memory", "name": "residual", "weights": None},
            "sha256": "0" * 64,
            "parameters": 1,
            "spec": json.loads(json.dumps(asdict(spec))),
        },
        "recipe": {"name": "x", "paper": "none", "fold_batch_norm": False, "scheme": {"ends": "8bit"}},
        "versions": {"zsq": "0", "torch": "0"},
        "timings": {},
        "results": {
            "measured": {},
            "estimated_without_data": {},
            "units": [],
            "size": {"teacher_bytes": 1, "student_bytes": 1, "student_parts": {}},
        },
    }
    return Run(student, record, images(9), spec, [{"stage": "synthesize", "done": 1, "loss": 0.5}])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- saving and loading


def test_save_and_load(tmp_path: Path) -> None:
    run = finished_run()
    folder = run.save(tmp_path / "runs" / "a")
    assert {p.name for p in folder.iterdir()} == FILES and is_run_folder(folder)
    again = load_run(folder)
    x = images(5, seed=1)
    assert torch.equal(again.student(x), run.student(x))
    assert torch.equal(again.images, run.images)
    assert (again.record, again.metrics, again.spec) == (run.record, run.metrics, run.spec)
    assert contents(again.save(tmp_path / "b")) == contents(folder)
    assert "exists and is not empty; nothing in it was changed" in message(lambda: run.save(folder))
    run.save(folder, force=True)


def test_metrics_are_json_whatever_was_logged(tmp_path: Path) -> None:
    run = finished_run()
    run.metrics = [{"stage": "reconstruct", "loss": math.nan, "snr": math.inf, "done": 3}]
    text = (run.save(tmp_path / "a") / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "stage": "reconstruct",
        "loss": None,
        "snr": None,
        "done": 3,
    }


def test_a_record_with_infinity_is_never_written(tmp_path: Path) -> None:
    run = finished_run()
    run.record["snr"] = math.inf
    with pytest.raises(ValueError, match="JSON"):
        run.save(tmp_path / "a")
    assert not (tmp_path / "a" / "run.json").exists()


def test_load_refuses_what_is_no_finished_run(tmp_path: Path) -> None:
    assert "is not a run folder: it has no run.json" in message(lambda: load_run(tmp_path))
    assert "is not a run folder" in message(lambda: load_run(tmp_path / "nowhere"))
    folder = finished_run().save(tmp_path / "a")
    record = folder / "run.json"
    good = json.loads(record.read_text())
    for text in ("", "{", '{"format": 1', "\x00\xff", "[" * 100_000):
        record.write_text(text)
        assert "cannot be read" in message(lambda: load_run(folder))
    record.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in message(lambda: load_run(folder))
    for value, shown in (([1], "None"), (3, "None"), ({**good, "format": 2}, "2"), ({}, "None")):
        record.write_text(json.dumps(value))
        text = message(lambda: load_run(folder))
        assert f"has format {shown}; this version of zsq reads format 1" in text
    record.write_text(json.dumps({**good, "status": "running"}))
    assert "The call that began it (zsq quantize x) continues it." in message(lambda: load_run(folder))
    record.write_text(json.dumps({**good, "status": "running", "command": None}))
    assert "is not finished. The call that began it continues it." in message(lambda: load_run(folder))
    broken: list[dict[str, Any] | None] = [{}, None, {"spec": None}, {"spec": {"input_size": [1]}}]
    for model in broken:
        record.write_text(json.dumps({**good, "model": model}))
        assert "incomplete or damaged" in message(lambda: load_run(folder))
    record.write_text(json.dumps(good))
    load_run(folder)


@pytest.mark.parametrize("name", sorted(FILES - {"run.json", "images.png"}))
def test_load_refuses_missing_and_damaged_files(name: str, tmp_path: Path) -> None:
    folder = finished_run().save(tmp_path / "a")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    message(lambda: load_run(folder))
    (folder / name).write_bytes(b"[" * 100_000)
    message(lambda: load_run(folder))
    (folder / name).unlink()
    text = message(lambda: load_run(folder))
    assert name in text


def test_load_does_not_need_the_contact_sheet(tmp_path: Path) -> None:
    folder = finished_run().save(tmp_path / "a")
    (folder / "images.png").unlink()
    load_run(folder)


# ---- claiming


def test_claiming_refuses_what_is_not_ours(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in message(lambda: claim_folder(file, force=True))
    assert "lies below" in message(lambda: claim_folder(file / "inside", force=False))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    (foreign / "images.safetensors").write_text("mine")
    before = contents(foreign)
    assert "nothing in it was changed" in message(lambda: claim_folder(foreign, force=False))
    assert "is not a run folder, so --force" in message(lambda: claim_folder(foreign, force=True))
    assert contents(foreign) == before
    claim_folder(tmp_path / "new" / "deep", force=False)
    assert (tmp_path / "new" / "deep").is_dir()
    claim_folder(tmp_path / "new" / "deep", force=False)  # empty


def test_force_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    folder = finished_run().save(tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    StateFolder(folder / "state")["batch-000"] = {"images": torch.ones(1)}
    claim_folder(folder, force=True)
    assert contents(folder) == {"notes.txt": b"mine"}


def test_leftovers_of_killed_writes_do_not_count(tmp_path: Path) -> None:
    (tmp_path / ".run.json.abcd1234").write_text("{")
    claim_folder(tmp_path, force=False)
    assert contents(tmp_path) == {}


def test_force_keeps_a_run_folder_recognisable_until_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished_run().save(tmp_path / "a")
    removed: list[str] = []
    original = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        assert is_run_folder(folder)
        removed.append(self.name)
        original(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    claim_folder(folder, force=True)
    assert removed[-1] == "run.json" and set(removed) == {
        *FILES,
        *("prompts.jsonl", "inspection.json", "report.html", "latency.jsonl"),
    }


def test_a_disk_that_fails_is_a_job_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished_run().save(tmp_path / "a")

    def fail(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(JobError, match="cannot be used: Read-only file system"):
        claim_folder(folder, force=True)
