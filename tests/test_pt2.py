"""Programs of torch.export: integers inside, the same numbers, loadable without zsq."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantization_networks import Residual, Tokens, images
from test_cli import call, refusal
from test_run import finished_run
from tiny_networks import message
from torch import nn

pytest.importorskip("onnx_ir")

from test_export import captured, run_of  # noqa: E402
from test_export_engine import engine_run  # noqa: E402

from zsq.errors import JobError  # noqa: E402
from zsq.export.pt2 import export_pt2  # noqa: E402

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("bits", ["W8A8", "W4A4", "W2A3", "W4"])
@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_parity(kind: type[nn.Module], bits: str, tmp_path: Path) -> None:
    run = run_of(captured(kind), bits, images(16))
    found = export_pt2(run, tmp_path / "student.pt2")
    assert found.path.stat().st_size == found.size and all(d.relative_error < 5e-3 for d in found.outputs)
    program = torch.export.load(found.path).module()
    for count in (1, 5):  # any batch size
        got, wanted = program(images(count)), run.student(images(count))
        assert float((got - wanted).norm() / wanted.norm()) < 5e-3


def test_the_form_that_lowering_takes(tmp_path: Path) -> None:
    run = engine_run(captured(Residual), "W4A8", images(16))
    program = torch.export.load(export_pt2(run, tmp_path / "student.pt2").path)
    ops = torch.ops.quantized_decomposed
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    weights = [n for n in calls if n.target is ops.dequantize_per_channel.default]
    assert len(weights) == 7 and {n.args[4:6] for n in weights} == {(-128, 127)}
    assert {t.dtype for name, t in program.state_dict.items() if "codes" in name} == {torch.int8}
    quantized = [n for n in calls if n.target is ops.quantize_per_tensor.default]
    assert {n.args[5] for n in quantized} == {torch.int8} and {n.args[3:5] for n in quantized} == {
        (-128, 127)
    }
    layers = [n for n in calls if n.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)]
    assert len(layers) == 7
    for layer in layers:  # its input and, but for the last one's, its result are quantized
        assert layer.args[0].target is ops.dequantize_per_tensor.default
    assert not any(n.target is torch.ops.aten.batch_norm.default for n in calls)


def test_it_loads_without_zsq(tmp_path: Path) -> None:
    run = run_of(captured(Residual), "W4A4", images(8))
    export_pt2(run, tmp_path / "student.pt2")
    torch.save({"x": images(3), "y": run.student(images(3))}, tmp_path / "both.pt")
    code = (
        "import sys; sys.modules['zsq'] = None\n"
        "import torch, torch.ao.quantization.fx._decomposed\n"
        "both = torch.load('both.pt')\n"
        "y = torch.export.load('student.pt2').module()(both['x'])\n"
        "assert torch.allclose(y, both['y'], rtol=1e-3, atol=1e-4)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zsq.export.pt2 as module

    run, path = run_of(captured(Residual), "W4A4", images(8)), tmp_path / "student.pt2"
    path.write_text("")
    assert "exists already" in message(lambda: export_pt2(run, path))
    (tmp_path / "file").write_text("")
    assert "lies below" in message(lambda: export_pt2(run, tmp_path / "file" / "student.pt2"))
    stored = module.stored_activation

    def shifted(*arguments: object) -> object:
        found = stored(*arguments)  # type: ignore[arg-type]
        object.__setattr__(found, "zero_point", found.zero_point + 1)
        return found

    monkeypatch.setattr(module, "stored_activation", shifted)
    with pytest.raises(JobError, match="does not compute what the student computes"):
        export_pt2(run, path, force=True)
    assert path.read_text() == ""


def test_command(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    finished_run().save(run)
    code, out, _ = call(capsys, "export", run, "--to", "pt2")
    assert code == 0 and "student.pt2" in out and "not an accuracy" in out and "torch.export.load" in out
    code, out, _ = call(capsys, "export", run, "--to", "pt2", "--force", "--json")
    assert code == 0 and json.loads(out)["file"] == "student.pt2"
    refused = refusal(capsys, "export", run, "--to", "pt2", "--target", "openvino")
    assert "--to pt2 says already what is to run it" in refused
    refused = refusal(capsys, "export", run, "--to", "pt2", "--container", "int8")
    assert "Leave out --container" in refused
