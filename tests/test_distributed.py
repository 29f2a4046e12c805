"""Several processes: the same images, the same result but for rounding, and no silent end."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_job import measured, tiny
from safetensors.torch import load_file

from zsq.distributed import ALONE, Group, joined, local_device, spread
from zsq.errors import UsageError
from zsq.quant.choice import Rows, random_choice
from zsq.run import load_run

HERE = Path(__file__).parent


def start(size: int, *command: str) -> list[tuple[int, str]]:
    """Exit code and output of each of `size` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(p for p in sys.path if p)
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path}
            | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        first = processes[0].communicate(timeout=120)[0]
        if command[1:2] == ("goes_on",):
            os.kill(processes[1].pid, signal.SIGKILL)  # a frozen one stays
        outputs = [first, *(p.communicate(timeout=30)[0] for p in processes[1:])]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def job(size: int, name: str, folder: Path) -> list[tuple[int, str]]:
    return start(size, str(HERE / "distributed_job.py"), name, str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process gives, and what two give, of which one is killed in a second run."""
    folder = tmp_path_factory.mktemp("jobs")
    tiny(folder / "alone")
    codes = job(2, "whole", folder)
    (folder / "end.json").write_text(json.dumps(codes))
    return folder


def close(one: Path, other: Path) -> None:
    """Two runs agree: the same images; the students but for the order of sums."""
    assert (one / "images.safetensors").read_bytes() == (other / "images.safetensors").read_bytes()
    a, b = load_run(one), load_run(other)
    torch.testing.assert_close(a.student(a.images), b.student(a.images), rtol=1e-3, atol=1e-4)
    codes, others = (load_file(p / "student.safetensors") for p in (one, other))
    for name, tensor in codes.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, others[name], rtol=1e-5, atol=1e-7, equal_nan=True)
        else:
            assert torch.equal(tensor, others[name])
    units = [run.record["results"]["units"] for run in (a, b)]
    assert [u["snr"] for u in units[0]] == pytest.approx([u["snr"] for u in units[1]], abs=1e-3)


def test_two_processes_give_what_one_gives(folder: Path) -> None:
    close(folder / "alone", folder / "run")
    assert load_run(folder / "run").record["processes"] == 2
    assert sorted(p.name for p in (folder / "run").iterdir()) == sorted(
        p.name for p in (folder / "alone").iterdir()
    )
    # the same numbers are logged for all units
    assert [m["item"] for m in load_run(folder / "run").metrics if m["stage"] == "reconstruct"] == [
        m["item"] for m in load_run(folder / "alone").metrics if m["stage"] == "reconstruct"
    ]
    assert json.loads((folder / "accuracy.json").read_text()) == measured(load_run(folder / "run"))


def test_a_killed_process_ends_the_job_with_a_message(folder: Path) -> None:
    (code, text), (killed, _) = json.loads((folder / "end.json").read_text())
    assert killed == -signal.SIGKILL and code == 1
    assert "rank 0: Process 1 (of 0 to 1) was lost: it ended or froze" in text
    assert "The same command goes on from what was finished, with any number of processes." in text


def test_three_processes_go_on_and_one_freezes(folder: Path) -> None:
    assert json.loads((folder / "killed" / "run.json").read_text())["status"] == "running"
    (first, text), _, (last, _) = job(3, "goes_on", folder)
    close(folder / "alone", folder / "killed")
    resumed = json.loads((folder / "resumed.json").read_text())
    assert resumed[:3] == [f"batch {k} of 3" for k in (1, 2, 3)] and "stem.conv" in resumed[3:]
    assert first == last == 1 and "Process 1 (of 0 to 2) was lost" in text


def test_collectives_and_an_error_in_another_process(tmp_path: Path) -> None:
    (first, text), (second, own) = job(2, "small_things", tmp_path)
    assert (tmp_path / "passed-0").exists() and (tmp_path / "passed-1").exists(), text + own
    assert first == second == 1
    assert "rank 1: the disk is on fire" in own
    assert "rank 0: Process 1 (of 0 to 1) failed: the disk is on fire" in text


def test_the_command_speaks_with_one_voice(tmp_path: Path) -> None:
    """20 images in 3 batches for 2 processes: the accuracy is that of one process."""
    rng = np.random.default_rng(0)
    data = tmp_path / "labelled.npz"
    np.savez(data, images=rng.integers(0, 256, (20, 8, 8, 1)).astype(np.uint8), labels=np.arange(20) % 10)
    arguments = ["-m", "zsq", "evaluate", "digits", "--data", str(data), "--batch-size", "7", "--json"]
    (code, text), (other, nothing) = start(2, *arguments)
    assert code == other == 0 and nothing == "", text + nothing
    found = json.loads(text[text.index("{\n") :])["teacher"]
    with pytest.raises(UsageError, match="does not exist"):
        zsq_evaluate(str(tmp_path / "nothing.npz"))
    assert found == zsq_evaluate(str(data))


def zsq_evaluate(data: str) -> dict[str, float | int | None]:
    import zsq
    from zsq.data import open_dataset

    model = zsq.load_model("digits")
    return zsq.accuracy(model.module, open_dataset(data, model.spec).batches(7)).to_json()


# ---- without other processes


def test_alone_is_trivial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as group:
        assert group is ALONE
    assert local_device("cuda:1") == "cuda:1"
    tensor = torch.ones(2)
    ALONE.add([tensor])
    pieces = {"a": {"x": tensor}}
    assert tensor.tolist() == [1, 1] and ALONE.exchange(b"a") == [b"a"]
    assert ALONE.pieces_of_first(pieces) is pieces and ALONE.first(lambda: 3) == 3
    made: list[int] = []
    spread(["a", "b", "c"], lambda i: {"x": torch.tensor(made.append(i) or i)}, pieces, ALONE)
    assert made == [1, 2] and pieces["c"]["x"].item() == 2


def test_shares_cover_everything_once() -> None:
    for count, size in ((7, 3), (32, 2), (2, 3), (5, 5)):
        shares = [Group(rank, size).share(count) for rank in range(size)]
        assert [i for share in shares for i in range(count)[share]] == list(range(count))
        lengths = [s.stop - s.start for s in shares]
        assert max(lengths) - min(lengths) <= 1


def test_devices_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert (local_device("cpu"), local_device("cuda")) == ("cpu", "cuda:1")
    with pytest.raises(UsageError, match="one device for several processes"):
        local_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="--nproc-per-node 2"):
        local_device("cuda")


def test_processes_together_draw_what_one_draws() -> None:
    """Also where a quantizer meets several rows an image, such as windows of tokens."""

    def rng() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    whole_last = torch.empty(7, 3, 2, 5).contiguous(memory_format=torch.channels_last)
    drawn = [
        random_choice(whole_last[s.start : s.stop], 0.3, rng(), Rows(s.start, s.stop, 7)).draws
        for s in (Group(rank, 3).share(7) for rank in range(3))
    ]
    assert torch.equal(torch.cat(drawn), random_choice(whole_last, 0.3, rng()).draws)
    for rows_an_image in (1, 4):
        whole = random_choice(torch.empty(7 * rows_an_image, 3, 5), 0.3, rng()).draws
        parts = [
            random_choice(
                torch.empty((s.stop - s.start) * rows_an_image, 3, 5), 0.3, rng(), Rows(s.start, s.stop, 7)
            ).draws
            for s in (Group(rank, 3).share(7) for rank in range(3))
        ]
        assert torch.equal(torch.cat(parts), whole)
