"""Parts of the export by themselves: folding into codes, containers, the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from quantization_networks import Residual, images
from test_cli import call, refusal
from test_run import finished_run
from torch import Tensor, nn

from zsq.export.codes import stored_activation, stored_weight
from zsq.export.prepare import prepared, scale_channels
from zsq.export.targets import TARGETS, container_widths
from zsq.graph.capture import capture
from zsq.graph.nodes import aten
from zsq.quant.attach import attach
from zsq.quant.calibrate import calibrate
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer, quantize_weight
from zsq.quant.scheme import parse_bits
from zsq.recipe import Calibration

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_scaling_channels_rounds_no_code(bits: int, axis: int) -> None:
    weight = torch.randn(5, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = quantize_weight(weight, bits=bits, axis=axis)
    factor = torch.tensor([2.0, -0.5, 1.0, 0.0, -4.0])
    shape = [1, 1, 1, 1]
    shape[axis] = -1
    wanted = quantizer() * factor.view(shape)
    scale_channels(quantizer, factor.double())
    assert bool((quantizer.scale > 0).all()) and int(quantizer.codes.max()) < 2**bits
    assert torch.equal(quantizer(), wanted)  # factors are powers of 2


class Norms(nn.Module):
    """BatchNorms with negative and zero gamma: after a convolution, a transposed and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.up, self.bn2 = nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4)
        self.grouped, self.bn3 = nn.ConvTranspose2d(4, 4, 2, 2, groups=2), nn.BatchNorm2d(4)
        self.fc, self.bn4 = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.up(torch.relu(self.bn1(self.conv(x)))))
        y: Tensor = self.bn4(self.fc(self.bn3(self.grouped(torch.relu(x))).mean((2, 3))))
        return y


def test_batch_norms_are_folded_into_codes() -> None:
    network = Norms().eval()
    for name, tensor in network.named_parameters():
        if name.startswith("bn") and name.endswith("weight"):
            tensor.data = torch.linspace(-1, 1, len(tensor))
            tensor.data[1] = 0.0
    student, _ = attach(capture(network.requires_grad_(False), (3, 8, 8)), parse_bits("W4A4"))
    calibrate(student, [images(16)], Calibration())
    folded, notes = prepared(student, images(1), TARGETS["onnxruntime"])
    left = [n.name for n in folded.graph.nodes if n.target is aten.batch_norm.default]
    assert len(left) == 1 and notes == [
        f"1 BatchNorms follow no layer directly and stay as float operations: {left[0]}"
    ]  # a transposed convolution in groups has scales for (C / groups) channels
    x = images(8, seed=1)
    assert torch.allclose(folded(x), student(x), rtol=1e-3, atol=1e-4)
    scales = [m.scale for m in folded.modules() if isinstance(m, WeightQuantizer)]
    assert all(bool((s > 0).all()) for s in scales)
    assert any(n.target is aten.batch_norm.default for n in student.graph.nodes)  # it is untouched


def weight_quantizer(codes: list[int], zero_point: int, bits: int) -> WeightQuantizer:
    return WeightQuantizer(
        torch.tensor([codes]), torch.tensor([0.5]), torch.tensor([zero_point]), bits=bits, axis=0
    )


def test_containers_of_weights() -> None:
    target, widths = TARGETS["onnxruntime"], (2, 4, 8)
    three = stored_weight(weight_quantizer([0, 7, 3], 3, 3), target, widths)
    assert (three.codes.tolist(), three.zero_point.tolist(), three.type_name) == ([[-3, 4, 0]], [0], "INT4")
    four = stored_weight(weight_quantizer([0, 15, 2], 2, 4), target, widths)
    assert (four.codes.tolist(), four.zero_point.tolist(), four.type_name) == ([[-8, 7, -6]], [-6], "INT4")
    two = stored_weight(weight_quantizer([0, 3, 1], 1, 2), target, (4, 8))
    assert (two.codes.tolist(), two.zero_point.tolist(), two.type_name) == ([[-1, 2, 0]], [0], "INT4")
    wide = stored_weight(weight_quantizer([0, 15, 2], 2, 4), target, (8,))  # -2..13, times 8
    assert (wide.codes.tolist(), wide.finer, wide.type_name) == ([[-16, 104, 0]], 8, "INT8")
    eight = stored_weight(weight_quantizer([0, 255, 10], 10, 8), target, widths)
    assert (eight.codes.tolist(), eight.zero_point.tolist()) == ([[-128, 127, -118]], [-118])
    with pytest.raises(ValueError, match="no container"):
        stored_weight(weight_quantizer([0, 255], 10, 8), TARGETS["tensorrt"], (8,))


def test_containers_of_activations() -> None:
    quantizer = ActivationQuantizer(bits=3)
    quantizer.set_range(torch.tensor(0.1), torch.tensor(2.0))
    unsigned = stored_activation(quantizer, TARGETS["onnxruntime"], (2, 4, 8))
    assert (unsigned.codes.tolist(), int(unsigned.zero_point), unsigned.type_name) == ([0, 7], 2, "UINT4")
    signed = stored_activation(quantizer, TARGETS["tensorrt"], (8,))
    assert (signed.codes.tolist(), int(signed.zero_point), signed.type_name) == ([-2, 5], 0, "INT8")
    wide = ActivationQuantizer(bits=8)
    wide.set_range(torch.tensor(0.1), torch.tensor(0.0))
    with pytest.raises(ValueError, match="no container"):
        stored_activation(wide, TARGETS["tensorrt"], (8,))


def test_widths() -> None:
    assert container_widths(TARGETS["onnxruntime"], None) == (2, 4, 8)
    assert container_widths(TARGETS["onnxruntime"], "int4") == (4, 8)
    assert container_widths(TARGETS["openvino"], "int8") == (8,)


def test_commands(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("onnxruntime")
    run, data = tmp_path / "run", tmp_path / "images.npz"
    finished_run().save(run)
    rng = np.random.default_rng(0)
    np.savez(data, images=rng.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8), labels=np.arange(12) % 7)
    code, out, err = call(capsys, "export", run)
    file = run / "student.onnx"
    assert code == 0 and not err and f"{file} (" in out and "default session options" in out
    assert "not an accuracy" in out and f"zsq evaluate {file} --data PATH" in out
    assert "exists already" in refusal(capsys, "export", run)
    code, out, _ = call(capsys, "export", run, "--force", "--container", "int8", "--json")
    assert code == 0 and json.loads(out) == {
        **json.loads(out),
        "file": "student.onnx",
        "bytes": file.stat().st_size,
    }
    of_file = json.loads(call(capsys, "evaluate", file, "--data", data, "--json")[1])
    of_run = json.loads(call(capsys, "evaluate", run, "--data", data, "--json")[1])
    assert of_file["student"] == of_run["student"]


def test_wrong_commands(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("onnxruntime")
    run = tmp_path / "run"
    assert "not a run folder" in refusal(capsys, "export", run)
    finished_run().save(run)
    assert "--to is one of onnx, openvino, pt2" in refusal(capsys, "export", run, "--to", "tflite")
    assert "does not load INT4" in refusal(
        capsys, "export", run, "--target", "tensorrt", "--container", "int4"
    )
    assert call(capsys, "export", run)[0] == 0
    file, missing = run / "student.onnx", tmp_path / "missing.onnx"
    assert "cannot be read" in refusal(capsys, "evaluate", missing, "--data", tmp_path)
    assert "Leave out --teacher" in refusal(capsys, "evaluate", file, "--teacher", "--data", tmp_path)
    assert "Leave out --weights" in refusal(capsys, "evaluate", file, "--mean", "0,0,0", "--data", tmp_path)
    assert "lies below" in refusal(capsys, "export", run, "--out", file / "below.onnx")


def test_shapes_know_the_batch() -> None:
    student, _ = attach(capture(Residual().eval().requires_grad_(False), (3, 8, 8)), parse_bits("W4A4"))
    calibrate(student, [images(4)], Calibration())
    folded, _ = prepared(student, images(1), TARGETS["onnxruntime"])
    shapes = {n.name: n.meta["shape"] for n in folded.graph.nodes if n.target is aten.conv2d.default}
    assert shapes["conv2d"] == (None, 6, 8, 8)
