"""ExecuTorch programs: the same numbers in its runtime, and what it would compute wrongly is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from quantization_networks import Residual, images
from test_cli import call, refusal
from test_run import finished_run
from tiny_networks import message
from torch import Tensor
from torch.utils import _pytree as pytree

pytest.importorskip("onnx_ir")

from test_export import captured, run_of  # noqa: E402
from test_export_engine import GRAPH_SIZE, engine_run, graph_of, noise  # noqa: E402

import zsq  # noqa: E402
import zsq.export.executorch as module  # noqa: E402
from zsq.errors import JobError  # noqa: E402
from zsq.export.executorch import export_executorch, open_executorch  # noqa: E402
from zsq.export.prepare import prepared  # noqa: E402
from zsq.export.pt2 import BYTES  # noqa: E402

Capture = pytest.CaptureFixture[str]


def needs_runtime() -> None:
    pytest.importorskip("executorch")


@pytest.mark.parametrize(
    "name, bits",
    [
        *(("resnet", bits) for bits in ("W8A8", "W4A8", "W2A8")),
        *((name, "W8A8") for name in ("separable", "mobilenetv3", "dense", "shuffle", "detector")),
    ],
)
def test_parity(name: str, bits: str, tmp_path: Path) -> None:
    needs_runtime()
    run = engine_run(graph_of(name), bits, noise(*GRAPH_SIZE))
    found = export_executorch(run, tmp_path / "student.pte")
    assert found.path.stat().st_size == found.size and all(d.relative_error < 5e-3 for d in found.outputs)
    # Nothing but what needs no integers is left to other kernels than XNNPACK's.
    assert not any(word in kind for kind in found.outside for word in ("conv", "linear", "addmm", "quantize"))
    about = json.loads(found.settings.read_text())
    assert about["zsq.target"] == "executorch" and about["outside_xnnpack"] == list(found.outside)
    again = open_executorch(found.path)
    x = noise(*GRAPH_SIZE, count=3)
    pairs = zip(pytree.tree_leaves(again.model(x)), pytree.tree_leaves(run.student(x)), strict=True)
    assert again.spec == run.spec
    assert all(float((got - wanted).norm() / wanted.norm()) < 5e-3 for got, wanted in pairs)


def test_only_layers_whose_result_is_rounded_keep_their_codes() -> None:
    run = engine_run(captured(Residual), "W8A8", images(8))
    student, _ = prepared(run.student, run.images, BYTES)
    assert module._free_unrounded_layers(student) == ["linear"]
    assert float((student(images(3)) - run.student(images(3))).abs().max()) < 1e-4
    run = run_of(captured(Residual), "W8A8", images(8))
    student, _ = prepared(run.student, run.images, BYTES)
    assert len(module._free_unrounded_layers(student)) > 1


def test_refused_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "import_extra", lambda *_: None)
    path = tmp_path / "student.pte"
    run = engine_run(captured(Residual), "W4A4", images(8))
    assert "activations of 8 bits only, and the run has some of 4" in message(
        lambda: export_executorch(run, path)
    )
    run = run_of(captured(Residual), "W8A8", images(8))
    assert "Quantize with --placement engine" in message(lambda: export_executorch(run, path))
    path.write_text("")
    assert "exists already" in message(lambda: export_executorch(run, path))
    assert list(tmp_path.iterdir()) == [path]


def test_what_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_runtime()
    run, path = engine_run(captured(Residual), "W8A8", images(8)), tmp_path / "student.pte"
    right = module.with_operators

    def shifted(student: object) -> object:
        found = right(student)  # type: ignore[arg-type]
        found.scale_0.mul_(1.5)
        return found

    monkeypatch.setattr(module, "with_operators", shifted)
    with pytest.raises(JobError, match="does not compute what the student computes"):
        export_executorch(run, path)
    assert not path.exists()


def test_damaged_files(tmp_path: Path) -> None:
    needs_runtime()
    run = engine_run(captured(Residual), "W8A8", images(8))
    found = export_executorch(run, tmp_path / "student.pte")
    found.path.write_bytes(found.path.read_bytes()[:100])
    assert "does not run here" in message(lambda: open_executorch(found.path))
    found.path.unlink()
    assert "cannot be read" in message(lambda: open_executorch(found.path))
    found.settings.write_text("{}")
    assert "zsq export RUN --to executorch" in message(lambda: open_executorch(found.path))


def test_command(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    finished_run().save(run)
    refused = refusal(capsys, "export", run, "--to", "executorch", "--container", "int8")
    assert "Leave out --container" in refused
    refused = refusal(capsys, "export", run, "--to", "executorch", "--target", "openvino")
    assert "--to executorch says already what is to run it" in refused
    monkeypatch.setitem(sys.modules, "executorch", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "executorch.runtime", raising=False)
    refused = refusal(capsys, "export", run, "--to", "executorch")
    assert "pip install 'zsq[executorch]'" in refused
    assert not (run / "student.pte").exists()


def test_command_writes_and_evaluates(tmp_path: Path, capsys: Capture) -> None:
    needs_runtime()
    run = tmp_path / "run"
    zsq.quantize(
        "digits", recipe="given-nearest", bits="W8A8", placement="engine", images=digits(16), out=run
    )
    code, out, _ = call(capsys, "export", run, "--to", "executorch")
    assert code == 0 and "student.pte" in out and "not an accuracy" in out and "one image a call" in out
    code, out, _ = call(capsys, "export", run, "--to", "executorch", "--force", "--json")
    assert code == 0 and json.loads(out)["file"] == "student.pte"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=pixels, labels=np.arange(12) % 10)
    tops = []
    for model in (run / "student.pte", run):
        code, out, _ = call(capsys, "evaluate", model, "--data", tmp_path / "test.npz", "--json")
        assert code == 0
        tops.append(json.loads(out)["student"]["top1"])
    assert tops[0] == pytest.approx(tops[1], abs=9)  # one image in twelve


def digits(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
