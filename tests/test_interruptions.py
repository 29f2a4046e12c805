"""Ctrl-C, full disks, read-only folders, removed files, a second process: told, and nothing is lost."""

import errno
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_input import FAST, SMALL, one_paragraph, run_command, snapshot
from killing import LOG, Server
from quantization_networks import Residual, teacher
from test_kills import Family, results, undisturbed
from test_pipeline import RESULTS, contents, tiny
from tiny_networks import message

from zsq.bench import run_bench
from zsq.cli import jobs
from zsq.errors import JobError
from zsq.models import Teacher
from zsq.progress import Progress
from zsq.resume import held

STUBBORN = """
import time

def stubborn():
    while True:
        try:
            print("begun", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("not yet", flush=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("server"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def family(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return undisturbed("genie", server, tmp_path_factory.mktemp("genie"))


@pytest.fixture(scope="module")
def model() -> Teacher:
    return teacher(Residual)


def goes_on(server: Server, family: Family, folder: Path) -> None:
    """The same command ends with the same bits."""
    done = server.call(folder, family.arguments)
    assert done["code"] == 0, (folder / LOG).read_text()
    assert results(folder / "run") == family.results


# ---- Ctrl-C


@pytest.mark.parametrize("stage", ["synthesize", "reconstruct"])
def test_once_stops_in_order(stage: str, server: Server, family: Family, tmp_path: Path) -> None:
    done = server.call(tmp_path, family.arguments, stage=stage, seconds=0.01, number=int(signal.SIGINT))
    assert done["code"] == 130
    last = (tmp_path / LOG).read_text().splitlines()[-1]
    assert last.startswith("Stopped. What was finished is kept in run; the same command goes on from there: ")
    assert last.endswith(shlex.join(["zsq", *family.arguments]))
    goes_on(server, family, tmp_path)


def test_twice_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(STUBBORN)
    command = [
        sys.executable,
        "-m",
        "zsq",
        "evaluate",
        "net.py:stubborn",
        "--input-size",
        "3,8,8",
        "--data",
        "x.npz",
    ]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A parent that runs in the background ignores SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line in ("begun\n", "not yet\n"):
                process.send_signal(signal.SIGINT)
            assert "Traceback" not in line
        assert process.wait(60) == -signal.SIGINT


def test_the_handler_of_the_caller_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert run_command(["recipes", "--json"])[0] == 0
    assert signal.getsignal(signal.SIGINT) is before


# ---- what the disk refuses


@pytest.mark.parametrize("limit", [1000, 4500, 7500])
def test_a_disk_without_room(limit: int, server: Server, family: Family, tmp_path: Path) -> None:
    """No file may be larger than so many bytes, which is the same to a write as a full disk."""
    done = server.call(tmp_path, family.arguments, limit=limit)
    assert done["code"] == 1
    text = one_paragraph((tmp_path / LOG).read_text())
    assert "could not be written: File too large" in text and "free some space" in text
    goes_on(server, family, tmp_path)


def test_a_folder_that_became_read_only(
    model: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    tiny(model, out=whole)

    def stop(event: Progress) -> None:
        if event.stage == "reconstruct":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny(model, out=out, progress=stop)
    (out / ".run.json.abcd1234").write_bytes(b"{")  # of a killed write
    before = snapshot(out)
    with monkeypatch.context() as patch:
        error = OSError(errno.EROFS, "Read-only file system")

        def refuse(*_: Any, **__: Any) -> Any:
            raise error

        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(JobError, match="cannot go on: Read-only file system"):
            tiny(model, out=out)
        patch.undo()
        patch.setattr(tempfile, "mkstemp", refuse)
        with pytest.raises(JobError, match="Read-only file system.*make the folder writable"):
            tiny(model, out=out)
    assert {k: v for k, v in before.items() if "abcd" not in k and "/" in k} == {
        k: v for k, v in snapshot(out).items() if "/" in k
    }
    tiny(model, out=out)
    assert all(contents(out)[name] == contents(whole)[name] for name in RESULTS)


@pytest.mark.parametrize("damage", ["removed", "emptied", "all removed"])
def test_state_that_vanishes_at_work(damage: str, model: Teacher, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    tiny(model, out=whole)

    def spoil(event: Progress) -> None:
        piece = out / "state/synthesis-000.piece"
        if event.item == "batch 2 of 2" and event.stage == "synthesize" and piece.exists():
            if damage == "all removed":
                shutil.rmtree(out / "state")
            elif damage == "removed":
                piece.unlink()
            else:
                piece.write_bytes(b"")

    with pytest.raises(JobError, match="synthesis-000.piece, which this run wrote, was removed or damaged"):
        tiny(model, out=out, progress=spoil)
    tiny(model, out=out)
    assert all(contents(out)[name] == contents(whole)[name] for name in RESULTS)


# ---- a second process, and the same command again


def test_the_same_command_at_the_same_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    command = ["quantize", *SMALL, *FAST, "--out", "new"]
    with held(tmp_path / "new"):
        code, err = run_command(command)
        assert code == 2 and "Another process is at work on new" in one_paragraph(err)
    assert not (tmp_path / "new").exists()
    assert run_command(command)[0] == 0


def test_two_benchmarks_in_one_folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.toml").write_text(
        'bits = ["W4A4"]\n[[networks]]\nname = "net"\nmodel = "nets.py:small"\ninput_size = [3, 8, 8]\n'
        'data = "labelled.npz"\n[[recipes]]\nname = "noise-nearest"\n'
    )
    before = snapshot(tmp_path)
    with held(tmp_path / "a/b/out"):
        assert "Another process" in message(
            lambda: run_bench("bench.toml", out="a/b/out", progress=lambda _: None)
        )
    assert snapshot(tmp_path) == before  # nor are the folders above it left


def test_a_finished_command_is_not_done_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the run's end and its measurement, the same command measures it."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    command = ["quantize", *SMALL, *FAST, "--data", "labelled.npz", "--out", "new"]

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "measure", stop)
        assert run_command(command)[0] == 130
    before = snapshot(tmp_path / "new")
    (tmp_path / "new/state").mkdir()  # killed before it was removed
    (tmp_path / "new/.run.json.a1b2c3d4").write_bytes(b"{")
    code, err = run_command(command)
    assert code == 0 and "has finished already" in err and "evaluate: student" in err
    after = snapshot(tmp_path / "new")
    assert after.keys() == before.keys()
    assert {k for k in after if after[k] != before[k]} == {"run.json"}
    code, err = run_command(command)
    assert code == 0 and "evaluate" not in err and snapshot(tmp_path / "new") == after
    for other in (["--seed", "1"], ["--json"]):  # another run, another command
        code, err = run_command([*command, *other])
        assert code == 2 and "new exists and is not empty" in one_paragraph(err)
    assert snapshot(tmp_path / "new") == after
