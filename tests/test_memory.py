"""Bounded memory: the same bits from files, a smaller peak, an account from shapes, too small devices."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quantization_networks import Residual, Summing, attached, images, teacher
from test_pipeline import TINY
from tiny_networks import message
from torch import nn

import zsq
from zsq.errors import JobError
from zsq.evaluate import accuracy, agreement
from zsq.graph.blocks import extract, split
from zsq.graph.capture import capture
from zsq.images.settings import Synthesis
from zsq.images.synthesize import synthesize
from zsq.memory import cache_bytes, estimate, read_bytes
from zsq.out_of_memory import in_chunks, said_of
from zsq.pipeline import quantize
from zsq.recover.storage import MEMORY, Storage
from zsq.recover.unit_tensors import forward_in_chunks, take
from zsq.student import student_to_bytes


def test_sizes() -> None:
    assert [read_bytes(text) for text in ("4GiB", "4 gib", "500MB", "1.5k" + "B", 7, "12")] == [
        2**32,
        2**32,
        500_000_000,
        1500,
        7,
        12,
    ]
    for wrong in ("4 apples", "", "-1GiB", "0", "GiB", "1TiB"):
        assert "such as 4GiB" in message(lambda wrong=wrong: read_bytes(wrong))  # type: ignore[misc]


@pytest.mark.parametrize("kind", [Residual, Summing])
def test_files_give_the_same_bits(kind: type[nn.Module], tmp_path: Path, caplog: Any) -> None:
    model = teacher(kind)
    arguments: dict[str, Any] = {"overrides": TINY, "bits": "W3A3", "seed": 3}
    plain = quantize(model, memory="1GiB", **arguments)
    with caplog.at_level(logging.INFO, "zsq"):
        bounded = quantize(model, memory=1000, out=tmp_path / "run", **arguments)
    assert "tensors between units are kept in files" in caplog.text
    assert student_to_bytes(bounded.student) == student_to_bytes(plain.student)
    assert bounded.record["results"] == plain.record["results"]
    assert not (tmp_path / "run" / "state").exists()
    assert "such as 4GiB" in message(lambda: quantize(model, memory="much", out=tmp_path / "b", **arguments))
    assert not (tmp_path / "b").exists()


def test_rooms(tmp_path: Path) -> None:
    """Layout and values, in memory and in files; files have no names."""
    plain = torch.randn(4, 3, 5, 2)
    for piece in (plain, plain.contiguous(memory_format=torch.channels_last), torch.randn(4, 6)):
        rooms = [storage.room(piece, 12) for storage in (MEMORY, Storage(tmp_path / "new"))]
        for room in rooms:
            room[4:8] = piece
            index = torch.tensor([5, 4, 7])
            assert torch.equal(take(room, index), piece[[1, 0, 3]])
            assert room.shape == (12, *piece.shape[1:]) and room[:4].stride() == piece.stride()
        assert list((tmp_path / "new").iterdir()) == []
    storage = Storage(tmp_path)
    room = storage.room(plain, 4)
    room.copy_(plain)
    storage.release()
    assert torch.equal(room, plain) and len(storage._maps) == 1
    del room
    assert len(storage._maps) == 0


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zsq.recover.storage.os.posix_fallocate", full)
    with pytest.raises(JobError, match="No space left on device. Free some space, or allow more --memory"):
        Storage(tmp_path).room(torch.ones(2), 10)


# glibc gives what is freed back at once and has one heap, so that the peak is what is in use, not how threads
# happened to share heaps (without, the difference is 70 to 280 MiB from run to run).
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
PEAK = """
import sys
import torch
from torch import nn
from zsq.models import Teacher
from zsq.pipeline import quantize

torch.set_num_threads(1)
wide = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
for _ in range(3):
    wide += [nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU()]
network = nn.Sequential(*wide, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
model = Teacher(network, input_size=(3, 32, 32), mean=(0,) * 3, std=(1,) * 3)
quantize(
    model, recipe="given", images=torch.randn(384, 3, 32, 32), memory=sys.argv[1], out=sys.argv[2],
    overrides={"reconstruction.steps": 3, "reconstruction.batch_size": 8, "calibration.num_images": 8},
)
# getrusage on Linux counts the parent's peak before exec too
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_the_peak_is_smaller(tmp_path: Path) -> None:
    """384 images of 64 x 32 x 32 floats: 96 MiB a tensor, and four of them are kept."""
    peaks = []
    for bound in ("4GiB", "1MiB"):
        command = [sys.executable, "-c", PEAK, bound, str(tmp_path / bound)]
        done = subprocess.run(command, env=os.environ | EXACT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)  # MiB
    assert peaks[0] - peaks[1] > 180, peaks  # 224: what is read of files counts too


# ---- the account


def test_cache_bytes_by_hand() -> None:
    """Residual: stem and block1 give 6 x 8 x 8 floats an image, block2 and fc 10 x 4 x 4 and 7."""
    graph, _, _, units = attached(Residual, "W4A4")
    assert [unit.name for unit in units] == ["stem.conv", "block1", "block2", "fc"]
    # At block1, in work: the outputs of stem and block1, each of teacher and student.
    assert cache_bytes(graph.graph, units, 10) == 10 * 2 * (384 + 384) * 4


def test_what_is_kept_is_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sum of living rooms is the account's."""
    graph, _, _, units = attached(Summing, "W4A4")
    live = most = 0
    x = images(8)
    with torch.no_grad():
        values = dict(zip(("x",), [x], strict=True))
        for index, unit in enumerate(units):
            part = extract(graph, unit.inputs, unit.outputs)
            found = forward_in_chunks(part, [values[name] for name in unit.inputs])
            values.update(zip(unit.outputs, found, strict=True))
            live = sum(2 * v.numel() * 4 for name, v in values.items() if name != "x")
            most = max(most, live)
            needed = {name for later in units[index + 1 :] for name in later.inputs}
            values = {name: v for name, v in values.items() if name in needed}
    assert cache_bytes(graph.graph, units, 8) == most


def test_resnet50_fits(timm: ModuleType) -> None:
    """1024 images of 224 x 224: 24 GiB of memory, or 16 GB on a device, with 4 GiB for what is kept."""
    network = timm.create_model("resnet50", pretrained=False).eval().requires_grad_(False)
    graph = capture(network, (3, 224, 224))
    units = split(graph.graph)
    shared = {"latent_size": 256, "batch_size": 32, "chunk": 64}
    memory = estimate(graph, units, num_images=1024, synthesis_batch=64, **shared)
    assert memory.weights == pytest.approx(2 * 25.6e6 * 4, rel=0.01)
    assert memory.images == 1024 * 3 * 224 * 224 * 4
    # The first block reads 64 x 56 x 56 and returns 256 x 56 x 56 floats; so does the next, from 256.
    assert memory.caches == 1024 * 2 * 2 * 256 * 56 * 56 * 4
    assert memory.caches > 12 * 2**30  # in memory it would not fit beside the rest on a device of 16 GB
    assert memory.reconstruction(4 * 2**30) < 10e9
    assert 8e9 < memory.synthesis < 14e9
    more = estimate(graph, units, num_images=2048, synthesis_batch=128, **shared)
    assert (more.caches, more.step) == (2 * memory.caches, memory.step)
    parameters = 4 * 4 * (256 + 1) * 128 * 56 * 56  # of the generator: 128 x 56 x 56 outputs, four times
    assert more.synthesis - parameters == 2 * (memory.synthesis - parameters)
    assert more.synthesis > 20e9  # the published batch does not fit


# ---- devices with too little memory


class Limited(nn.Module):
    """Runs out of memory with more images than `most`."""

    def __init__(self, inner: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most = inner, most
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> Any:
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner(x)


def test_chunks_are_halved() -> None:
    asked: list[tuple[int, int]] = []

    def call(rows: slice) -> int:
        asked.append((rows.start, rows.stop))
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError
        return rows.stop - rows.start

    assert [n for _, n in in_chunks(call, 10, 8, "work")] == [2, 2, 2, 2, 2]
    assert asked == [(0, 8), (0, 4), (0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]


def test_evaluation_and_caching_go_on_with_fewer_images(caplog: pytest.LogCaptureFixture) -> None:
    model = teacher(Residual).module
    x, labels = images(40), torch.arange(40) % 7
    whole = accuracy(model, [(x, labels)])
    with caplog.at_level(logging.INFO, "zsq"):
        assert accuracy(Limited(model, 12), [(x, labels)]) == whole
    assert "The device ran out of memory: evaluation goes on with 20 images at once." in caplog.text
    assert "goes on with 10 images at once" in caplog.text
    a, b = agreement(Limited(model, 9), model, x), agreement(model, model, x)
    assert a["top1_agreement"] == b["top1_agreement"] == 100 and a["num_images"] == 40
    graph, _, _, units = attached(Residual, "W4A4")
    part = extract(graph, ["x"], units[0].outputs)
    (expected,) = forward_in_chunks(part, [x])
    (found,) = forward_in_chunks(Limited(part, 5), [x])
    torch.testing.assert_close(found, expected)
    with pytest.raises(JobError, match="evaluation fails for a single image"):
        accuracy(Limited(model, 0), [(x, labels)])


def test_what_pytorch_says_of_memory_is_cut_to_what_matters() -> None:
    said = "CUDA out of memory. Tried to allocate 2 MiB. GPU 0 has 9 GiB of which 1 MiB is free."
    more = " Process 1 has 5 GiB memory in use. Including non-PyTorch memory, this process has 4 GiB in use."
    assert said_of(torch.OutOfMemoryError(said + more + "\nSee documentation.")) == said.rstrip(".")
    assert said_of(torch.OutOfMemoryError()) == "no details"


def test_synthesis_and_reconstruction_say_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model = teacher(Residual)
    graph = capture(model.module, model.spec.input_size)
    with monkeypatch.context() as patch:
        patch.setattr("zsq.images.synthesize.synthesize_batch", out_of_memory)
        with pytest.raises(JobError, match=r"2.00 GiB\). Lower synthesis.batch_size \(now 128\)"):
            synthesize(graph, Synthesis(), (3, 8, 8), seed=0, finished={}, log=lambda *event: None)
    with monkeypatch.context() as patch:
        patch.setattr("zsq.images.refine.refine_batch", out_of_memory)
        gradients = {"refinement.gradients": "all_units", "refinement.steps": 1, "refinement.warmup_steps": 1}
        with pytest.raises(JobError, match=r"Lower synthesis.batch_size.*now all_units"):
            zsq.quantize(model, recipe="sadag", bits="W4A4", overrides=TINY | gradients)
    with monkeypatch.context() as patch:
        patch.setattr("zsq.recover.learn_unit.take", out_of_memory)
        with pytest.raises(JobError, match=r"reconstruction.batch_size \(now 8\)"):
            zsq.quantize(model, overrides=TINY)
    with monkeypatch.context() as patch:
        patch.setattr("zsq.recover.reconstruct.calibrate", out_of_memory)
        with pytest.raises(JobError, match="calibration.num_images"):
            zsq.quantize(model, overrides=TINY)


def test_the_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import zsq.cli

    arguments = ["quantize", "digits", "--recipe", "noise-nearest", "--memory", "much"]
    with pytest.raises(SystemExit) as caught:
        zsq.cli.main([*arguments, "--out", str(tmp_path / "run")])
    assert caught.value.code == 2 and not (tmp_path / "run").exists()
    assert "Error: --memory takes a size such as 4GiB or 500MB; got 'much'." in capsys.readouterr().err
