"""Exported files: the same numbers in the engine as in PyTorch, traps of the engine, what is refused."""

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_networks import NETWORKS, graph_of
from graph_networks import SIZE as GRAPH_SIZE
from quantization_networks import SIZE, Residual, Tokens, images, made
from test_run import finished_run
from test_student import Wide, wide
from tiny_networks import message
from torch import Tensor, fx, nn

from zsq.errors import JobError
from zsq.export.targets import TARGETS, container_widths
from zsq.graph.capture import capture
from zsq.graph.nodes import aten
from zsq.models import ModelSpec
from zsq.quant.attach import attach
from zsq.quant.calibrate import calibrate
from zsq.quant.quantizers import ActivationQuantizer
from zsq.quant.scheme import parse_bits
from zsq.recipe import Calibration
from zsq.run import Run

for package in ("onnx", "onnx_ir", "onnxruntime", "ml_dtypes"):
    pytest.importorskip(package)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from zsq.export.bisect import first_difference  # noqa: E402
from zsq.export.engine import EngineModel, SessionOptions, open_engine  # noqa: E402
from zsq.export.lower import lower, serialized  # noqa: E402
from zsq.export.onnx import Export, export_onnx  # noqa: E402
from zsq.export.openvino import OpenVinoModel  # noqa: E402
from zsq.export.openvino_ir import export_openvino, open_representation  # noqa: E402
from zsq.export.operations import EMITTERS  # noqa: E402
from zsq.export.prepare import prepared  # noqa: E402

BITS = ("W8A8", "W4A8", "W4A4", "W3A3", "W2A8", "W2A4", "W2A2", "W8A2", "W4")
PLACES = (("onnxruntime", None), ("onnxruntime", "int8"), ("openvino", None), ("tensorrt", None))
FLOAT = 5e-3  # relative error: sums in another order turn a code at a tie now and then; else it is 1e-7


def run_of(graph: fx.GraphModule, bits: str, x: Tensor, *, ends: str = "same") -> Run:
    """A calibrated student of a captured network, as a run without a record."""
    student, _ = attach(graph, parse_bits(bits, ends=ends))
    calibrate(student, [x], Calibration(num_images=len(x)))
    size = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    spec = ModelSpec(input_size=size, mean=(0.5,) * size[0], std=(0.25,) * size[0], crop_fraction=1.0)
    return Run(student, {"bits": bits, "recipe": {"name": "test"}, "model": {"sha256": "ab"}}, x, spec)


@functools.cache
def captured(kind: type[nn.Module]) -> fx.GraphModule:
    return capture(made(kind).requires_grad_(False), SIZE)


def exported(run: Run, folder: Path, **options: Any) -> Export:
    return export_onnx(run, folder / "student.onnx", **options)


def proto(export: Export) -> Any:
    return onnx.load(export.path)


def kinds(export: Export) -> list[str]:
    return [node.op_type for node in proto(export).graph.node]


def worst(export: Export) -> float:
    return max(d.relative_error for d in export.verification.optimized)


def stored(export: Export) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in proto(export).graph.initializer}


# ---- parity


@pytest.mark.parametrize("target, container", PLACES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_parity(kind: type[nn.Module], bits: str, target: str, container: str | None, tmp_path: Path) -> None:
    run = run_of(captured(kind), bits, images(48))
    export = exported(run, tmp_path, target=target, container=container)
    check = export.verification
    assert check.session == SessionOptions()  # loads and agrees as it is
    assert all(d.relative_error < FLOAT for d in check.plain)
    widths = container_widths(TARGETS[target], container)
    weight, _, activation = bits[1:].partition("A")
    exact = (target, container) == ("onnxruntime", None) or not activation or int(activation) < 8
    exact |= target == "openvino" and int(weight) <= 4
    assert worst(export) < (FLOAT if exact else 0.02)  # the engine rounds biases between 8-bit codes
    if target != "tensorrt":
        x = images(5, seed=1)
        got, wanted = open_engine(export.path).model(x), run.student(x)
        assert float((got - wanted).norm() / wanted.norm()) < 0.05
    types = {onnx.TensorProto.DataType.Name(t.data_type) for t in stored(export).values()}
    expected = next(w for w in widths if w >= int(weight))
    assert f"INT{expected}" in types and types <= {"FLOAT", "INT64"} | {
        f"{sign}INT{w}" for w in widths for sign in ("", "U")
    }


@pytest.mark.parametrize("bits", ["W8A8", "W2A4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network(name: str, bits: str, tmp_path: Path) -> None:
    x = torch.randn(8, *GRAPH_SIZE, generator=torch.Generator().manual_seed(0))
    export = exported(run_of(graph_of(name), bits, x), tmp_path)
    assert worst(export) < FLOAT
    assert export.verification.session == SessionOptions()
    assert "BatchNormalization" not in kinds(export)


def test_any_batch_size_and_what_the_file_says(tmp_path: Path) -> None:
    run = run_of(captured(Residual), "W3A3", images(16), ends="8bit")
    export = exported(run, tmp_path)
    file = open_engine(export.path)
    for count in (1, 2, 7):
        assert torch.allclose(file.model(images(count)), run.student(images(count)), rtol=1e-4, atol=1e-5)
    assert file.spec == run.spec and file.model.input_shape == ["batch", *SIZE]
    assert file.metadata["zsq.recipe"] == "test" and file.metadata["zsq.bits"] == "W3A3"
    assert file.metadata["zsq.teacher_sha256"] == "ab" and file.metadata["zsq.target"] == "onnxruntime"
    settings = json.loads(export.settings.read_text())
    assert settings["session"] == {"graph_optimization_level": "ORT_ENABLE_ALL", "disabled_optimizers": []}
    assert settings["verified_on_own_images"]["num_images"] == 16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_packed(bits: int, tmp_path: Path) -> None:
    export = exported(run_of(wide(), f"W{bits}", torch.randn(4, 1, 16, 16)), tmp_path)
    weights = sum(p.numel() for p in Wide().parameters() if p.ndim == 2)
    width = max(bits, 4) if bits > 2 else 2
    assert export.size / (4 * weights) == pytest.approx(width / 32, rel=0.15)
    assert proto(export).opset_import[0].version == (25 if bits == 2 else 21)


# ---- traps of engines (ONNX Runtime 1.31 unless said otherwise)


class TwoLayers(nn.Module):
    """conv, a nonlinearity, conv: the pattern of most traps."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.act(self.first(x)))
        return y


def two_layers(bits: str, act: nn.Module | None = None, scale: float = 1.0) -> Run:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = TwoLayers(act).requires_grad_(False)
    return run_of(capture(network, SIZE), bits, scale * images(16))


def only_quantizer(run: Run) -> ActivationQuantizer:
    (found,) = (m for m in run.student.modules() if isinstance(m, ActivationQuantizer))
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("target, container", PLACES)
def test_codes_that_the_quantizer_has_not_are_clipped(
    target: str, container: str | None, bits: int, tmp_path: Path
) -> None:
    run = two_layers(f"W8A{bits}")
    with torch.no_grad():
        only_quantizer(run).scale.mul_(0.3)  # values far beyond the range
    export = exported(run, tmp_path, target=target, container=container)
    assert worst(export) < FLOAT
    graph = proto(export).graph
    (quantize,) = (node for node in graph.node if node.op_type == "QuantizeLinear")
    makers = {node.output[0]: node for node in graph.node}
    clip = makers[quantize.input[0]]
    clip = makers[clip.input[0]] if clip.op_type == "Max" else clip  # signed codes are clipped below too
    if (target, bits) == ("tensorrt", 7):  # 0..127 is where a signed byte ends
        assert clip.op_type == "Relu"
        return
    limit = float(onnx.numpy_helper.to_array(stored(export)[clip.input[1]]))
    assert clip.op_type == "Min" and limit == pytest.approx((2**bits - 1) * float(only_quantizer(run).scale))


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.Hardtanh(-1, 1), nn.ReLU()])
@pytest.mark.parametrize("bits", ["W4A4", "W8A4", "W2A2", "W4A2"])
def test_clip_or_relu_before_few_bits(act: nn.Module, bits: str, tmp_path: Path) -> None:
    """A Clip there does not load; a ReLU is dropped although the zero point is not the smallest code."""
    run = two_layers(bits, act, scale=4.0)
    only_quantizer(run).set_range(torch.tensor(0.5), torch.tensor(2.0))
    export = exported(run, tmp_path)
    assert worst(export) < FLOAT and export.verification.session == SessionOptions()


def test_bias_stays_float_at_few_bits(tmp_path: Path) -> None:
    """Where codes follow a layer, the engine rounds its bias to multiples of the two scales' product."""
    for bits in ("W4A4", "W2A4"):
        run = run_of(graph_of("resnet"), bits, torch.randn(8, *GRAPH_SIZE))
        saved = str(tmp_path / "optimized.onnx")
        EngineModel(exported(run, tmp_path, force=True).path.read_bytes(), saved=saved)
        tensors = onnx.load(saved).graph.initializer
        assert not any(t.data_type == onnx.TensorProto.INT32 for t in tensors)


def test_bytes_use_their_whole_range(tmp_path: Path) -> None:
    """4-bit codes in bytes are multiplied by 8 and more, so that a rounded bias loses as much less."""
    run = two_layers("W4A8")
    export = exported(run, tmp_path, container="int8")
    codes = onnx.numpy_helper.to_array(stored(export)["first.codes"])
    assert codes.dtype == np.int8 and 64 <= np.abs(codes).max() <= 127 and not (codes % 8).any()
    assert worst(export) < FLOAT


@pytest.mark.parametrize("bits", ["W2A8", "W2A2", "W2A4", "W8A2", "W2"])
def test_linear_layers_of_two_bits_load(bits: str, tmp_path: Path) -> None:
    for kind in (Residual, Tokens):
        export = exported(run_of(captured(kind), bits, images(16)), tmp_path, force=True)
        assert export.verification.session == SessionOptions() and worst(export) < FLOAT


def test_no_output_type_beside_a_zero_point(tmp_path: Path) -> None:
    export = exported(run_of(captured(Tokens), "W4A4", images(16)), tmp_path)
    quantize = [node for node in proto(export).graph.node if node.op_type == "QuantizeLinear"]
    assert quantize and all(len(node.input) == 3 and not node.attribute for node in quantize)


def test_timm_norms_are_folded(timm: ModuleType, tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), timm.layers.BatchNormAct2d(8)
            self.fc = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.bn(self.conv(x)).mean((2, 3)))
            return y

    export = exported(run_of(captured(Normed), "W4A4", images(16)), tmp_path)
    assert not {"BatchNormalization", "Mul", "Add"} & set(kinds(export)) and not export.notes


def test_bytes_are_computed_as_integers(tmp_path: Path) -> None:
    """Conv, ReLU, conv with 8 bits: the first one's codes in and out are bytes, and it becomes integer."""

    class Three(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.act(self.middle(self.act(self.first(x)))))
            return y

        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Conv2d(8, 8, 3, padding=1)

    saved = tmp_path / "optimized.onnx"
    for bits, container, fused in (("W8A8", "int8", 1), ("W4A8", "int8", 1), ("W8A8", None, 0)):
        run = run_of(captured(Three), bits, images(16))
        export = exported(run, tmp_path, container=container, force=True)
        EngineModel(export.path.read_bytes(), saved=str(saved))
        assert [n.op_type for n in onnx.load(saved).graph.node].count("QLinearConv") == fused


def test_openvino_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    for bits in ("W8A8", "W4A4", "W3A3", "W2A4"):
        run = run_of(captured(Residual), bits, images(16))
        found = exported(run, tmp_path, target="openvino", force=True)
        check = found.in_openvino
        assert check is not None and all(d.agrees for d in check.outputs) and check.num_images == 16
        beside = json.loads(found.settings.read_text())["openvino"]
        assert beside["engine"] == check.engine and beside["properties"]["INFERENCE_PRECISION_HINT"] == "f32"


def test_without_openvino_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    run = run_of(captured(Residual), "W4A4", images(8))
    found = exported(run, tmp_path, target="openvino")
    assert found.in_openvino is None and any("not installed" in note for note in found.notes)
    assert "zsq[openvino]" in message(lambda: export_openvino(run, tmp_path / "student.xml"))


def test_openvino_ir(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    x = images(16)
    for bits in ("W8A8", "W4A4", "W2A4"):
        run = run_of(captured(Residual), bits, x)
        written = export_openvino(run, tmp_path / "student.xml", force=True)
        assert written.size == sum(p.stat().st_size for p in (written.path, written.weights))
        file = open_representation(written.path)
        assert file.spec == run.spec
        got, wanted = file.model(x), run.student(x)
        assert float((got - wanted).norm() / wanted.norm()) < 0.02
        assert file.model(x[:3]).shape == (3, wanted.shape[1])  # any batch
    assert "exists already" in message(lambda: export_openvino(run, tmp_path / "student.xml"))
    assert "ends in .xml" in message(lambda: export_openvino(run, tmp_path / "student.onnx"))
    assert "does not load INT2" in message(
        lambda: export_openvino(run, tmp_path / "other.xml", container="int2")
    )
    written.settings.unlink()
    assert "--to openvino" in message(lambda: open_representation(written.path))


def test_a_difference_in_openvino_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    forward = OpenVinoModel.forward
    monkeypatch.setattr(OpenVinoModel, "forward", lambda self, x: forward(self, x) + 1)
    run = run_of(captured(Residual), "W4A4", images(8))
    with pytest.raises(JobError, match="computes something else"):
        exported(run, tmp_path, target="openvino")
    with pytest.raises(JobError, match="computes something else"):
        export_openvino(run, tmp_path / "student.xml")
    assert not list(tmp_path.iterdir())


def test_symmetric_targets_have_no_zero_points(tmp_path: Path) -> None:
    for bits in ("W8A8", "W4A4"):
        run = run_of(captured(Residual), bits, images(48), ends="8bit")
        export = exported(run, tmp_path, target="tensorrt", force=True)
        points = [t for name, t in stored(export).items() if name.endswith(".zero_point")]
        assert points and not any(onnx.numpy_helper.to_array(t).any() for t in points)
        assert {t.data_type for t in points} == {onnx.TensorProto.INT8}
        assert any("rounded again" in note for note in export.notes)
        assert export.verification.agreement_with_run is not None


# ---- what does not agree, and other refusals


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = lambda b, node, x: b.op("Abs", x, name=node.name)  # noqa: E731
    monkeypatch.setitem(EMITTERS, aten.relu.default, wrong)
    run = run_of(captured(Residual), "W4A4", images(16))
    with pytest.raises(JobError, match="does not compute what the student computes") as caught:
        exported(run, tmp_path)
    assert "They part at the node relu." in str(caught.value) and "so it was not written" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_engine_cannot_run_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("Non-zero status code\nwhile running Expand")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", fails)
    with pytest.raises(JobError, match="does not run the network: Non-zero status code while running Expand"):
        exported(run_of(captured(Residual), "W4A4", images(16)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_session_options_are_found_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the clips that keep ONNX Runtime from its fault, other session options are what works."""
    import zsq.export.lower as module

    builder = module.Builder
    monkeypatch.setattr(module, "Builder", lambda *, exact, integer_biases: builder(exact=False))
    run = two_layers("W4A4", scale=4.0)
    only_quantizer(run).set_range(torch.tensor(0.5), torch.tensor(2.0))
    export = exported(run, tmp_path)
    needed = export.verification.session
    assert needed != SessionOptions()
    assert json.loads(export.settings.read_text())["session"] == needed.to_json()
    wanted = run.student(run.images)
    assert torch.allclose(open_engine(export.path).model(run.images), wanted, rtol=1e-3, atol=1e-4)
    export.settings.unlink()  # the defaults then give something else
    assert not torch.allclose(open_engine(export.path).model(run.images), wanted, rtol=1e-3, atol=1e-4)


def test_a_difference_that_only_fusions_make_is_found(tmp_path: Path) -> None:
    """With an output after every node nothing is fused, and nothing differs."""
    run = two_layers("W4A4", scale=4.0)
    only_quantizer(run).set_range(torch.tensor(0.5), torch.tensor(2.0))
    target = TARGETS["onnxruntime"]
    student, _ = prepared(run.student, run.images, target)
    content = serialized(lower(student, target, (4, 8), {}))
    assert first_difference(content, SessionOptions(), student, run.images) is None
    model = onnx.load_from_string(content)  # without the clip the ReLU before the codes is dropped
    (unclipped,) = (node for node in model.graph.node if node.op_type == "Min")
    (codes,) = (node for node in model.graph.node if node.op_type == "QuantizeLinear")
    codes.input[0] = unclipped.input[0]
    model.graph.node.remove(unclipped)
    assert first_difference(model.SerializeToString(), SessionOptions(), student, run.images) == "conv2d_1"


class Features(nn.Module):
    """Operations that are rare, each on the features of a convolution (4, 9, 7), stacked in the end."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.operation = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5), operation

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self.conv(x))
        return self.fc(y.expand(-1, 4, -1, -1).mean((2, 3)))  # type: ignore[no-any-return]


RARE: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda x: F.normalize(x, dim=1),
    "norm of order 1": lambda x: torch.linalg.vector_norm(x, 1, dim=(2, 3), keepdim=True),
    "largest": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True),
    "variance": lambda x: x.var(dim=(2, 3), keepdim=True),
    "biased variance": lambda x: x.var(dim=1, unbiased=False, keepdim=True),
    "corrected variance": lambda x: torch.var(x, dim=(1, 2), correction=2, keepdim=True),
    "addcmul": lambda x: torch.addcmul(x, x, x.sigmoid(), value=0.5),
    "expand_as": lambda x: x + x.amax((2, 3), keepdim=True).expand_as(x),
    "bicubic": lambda x: F.interpolate(x, size=(13, 15), mode="bicubic"),
    "bicubic to the corners": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=True),
    "bilinear by a factor": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "nearest, to a size": lambda x: F.interpolate(x, size=(13, 15)),
    "nearest, smaller": lambda x: F.interpolate(x, size=(5, 3)),
    "adaptive mean": lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
    "adaptive maximum": lambda x: F.adaptive_max_pool2d(x, (3, 1)),
    "gated halves": lambda x: F.glu(x, 1).repeat(1, 2, 1, 1),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x) + torch.where(x <= 0.5, 0.0, x),
    "masks": lambda x: x.masked_fill(x < 0, 0.2) * (x >= -1).to(x.dtype) + x.sign() * x.floor() - x.ceil(),
    "a stored mask": lambda x: x.masked_fill(torch.arange(7) > 4, 0.0),
    "largest and smallest": lambda x: x.max(1, keepdim=True)[0] - x.min(1, keepdim=True).values,
    "instance norm": lambda x: F.instance_norm(x),
    "generalised mean": lambda x: F.avg_pool2d(x.clamp(min=1e-6).pow(torch.full((4, 1, 1), 3.0)), (9, 7)),
    "selu": lambda x: F.celu(F.selu(x), 0.5),
    "log_sigmoid": lambda x: F.logsigmoid(x) * (1 - x),
    "flipped": lambda x: x.flip(3) + x.flip((2, 3)) / 2,
    "unshuffled": lambda x: F.pixel_unshuffle(x[:, :1, :8, :6], 2),
    "repeated": lambda x: x.mean((2, 3), keepdim=True).repeat(1, 1, 3, 2),
    "waves": lambda x: x.sin() + x.cos().square() + (x.abs() + 1).reciprocal(),
    "repeated rows": lambda x: x.repeat_interleave(3, 2),
    "repeated images": lambda x: x.repeat_interleave(2, 0).unflatten(0, (x.shape[0], 2)).mean(1),
    "shape of another": lambda x: x.flatten(2).reshape_as(x) + x.flatten(1).view_as(x),
    "windows": lambda x: x.unfold(2, 3, 2).unfold(3, 5, 1).amax((-1, -2)),
    "patches": lambda x: F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=2).unflatten(1, (4, 6)),
    "chosen rows": lambda x: x[:, :, torch.tensor([4, 0, 0, 8])],
    "repeated columns": lambda x: (
        x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1).unflatten(0, (-1, 4)).mean(2)
    ),
    "log_softmax": lambda x: F.log_softmax(x, 1),
}


def noise(count: int) -> Tensor:
    return torch.randn(count, 3, 9, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", RARE)
def test_rare_operations(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Features(RARE[name]).eval().requires_grad_(False)
    export = exported(run_of(capture(network, (3, 9, 7)), "W4A4", noise(8)), tmp_path)
    assert worst(export) < FLOAT and export.verification.session == SessionOptions()


@pytest.mark.parametrize(
    "operation, expected",
    [
        (lambda x: torch.linalg.vector_norm(x, 3, dim=1, keepdim=True), "order 3"),
        (lambda x: x.var(dim=0, keepdim=True) + x, "over the batch"),
        (lambda x: F.adaptive_max_pool2d(x, 2), "needs a divisor"),
        (lambda x: x.mean(0, keepdim=True).repeat(x.shape[0], 1, 1, 1) + x, "by the batch"),
        (lambda x: (x * 3).to(torch.int32).abs() + x, "type torch.int32"),
        (lambda x: x[:, torch.tensor([0, 1]), torch.tensor([2, 3])][:, None], "several axes"),
    ],
)
def test_rare_operations_that_have_no_form(
    operation: Callable[[Tensor], Tensor], expected: str, tmp_path: Path
) -> None:
    graph = capture(Features(operation).eval().requires_grad_(False), (3, 9, 7))
    run = run_of(graph, "W4A4", noise(8))
    assert expected in message(lambda: exported(run, tmp_path)) and not list(tmp_path.iterdir())


def test_unknown_operations_are_named(tmp_path: Path) -> None:
    class Summed(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).cumsum(1)

    run = run_of(captured(Summed), "W4A4", images(8))
    text = message(lambda: exported(run, tmp_path))
    assert "aten.cumsum.default" in text and "cannot export" in text and not list(tmp_path.iterdir())


def test_wrong_calls(tmp_path: Path) -> None:
    run = two_layers("W2A2")
    assert "Expected one of onnxruntime, openvino, tensorrt" in message(
        lambda: exported(run, tmp_path, target="trt")
    )
    assert "Expected one of int2, int4, int8" in message(lambda: exported(run, tmp_path, container="int3"))
    refused = message(lambda: exported(run, tmp_path, target="openvino", container="int2"))
    assert "does not load INT2" in refused and "--container int4" in refused
    assert "no convolutions of less than 8 bits" in message(
        lambda: exported(run, tmp_path, target="tensorrt", container="int4")
    )
    assert not list(tmp_path.iterdir())
    exported(run, tmp_path)
    assert "exists already" in message(lambda: exported(run, tmp_path))
    assert exported(run, tmp_path, force=True).size > 0


def test_a_damaged_run(tmp_path: Path) -> None:
    folder, file = tmp_path / "run", tmp_path / "student.onnx"
    assert "not a run folder" in message(lambda: export_onnx(folder, file))
    finished_run().save(folder)
    assert export_onnx(folder, file).size > 0
    content = (folder / "student.safetensors").read_bytes()
    (folder / "student.safetensors").write_bytes(content[: len(content) // 2])
    assert "damaged" in message(lambda: export_onnx(folder, tmp_path / "other.onnx"))
    run = two_layers("W4A4")
    only_quantizer(run).set_range(torch.tensor(float("nan")), torch.tensor(0.0))
    assert "no usable range" in message(lambda: export_onnx(run, tmp_path / "other.onnx"))
    assert not (tmp_path / "other.onnx").exists()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = two_layers("W4A4")
    (tmp_path / "file").write_text("")
    assert "lies below" in message(lambda: export_onnx(run, tmp_path / "file" / "student.onnx"))
    (tmp_path / "folder.onnx").mkdir()
    assert "exists already" in message(lambda: export_onnx(run, tmp_path / "folder.onnx", force=True))
    import zsq.export.account as module

    write = module.write_atomic

    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise JobError("the disk is full")
        write(path, content)

    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(JobError, match="disk is full"):
        export_onnx(run, tmp_path / "student.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder.onnx"}


@pytest.mark.parametrize("package", ["onnx", "onnx_ir", "onnxruntime", "ml_dtypes"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    text = message(lambda: exported(two_layers("W4A4"), tmp_path))
    assert package in text and "pip install 'zsq[onnx]'" in text and not list(tmp_path.iterdir())


def test_files_that_are_no_exports(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    assert "cannot be read" in message(lambda: open_engine(path))
    path.write_bytes(b"no network")
    assert "does not load" in message(lambda: open_engine(path))
    export = exported(two_layers("W4A4"), tmp_path)
    model = onnx.load(export.path)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert "does not say how its images are prepared" in message(lambda: open_engine(path))
    shutil.copy(export.path, path)
    path.with_name("x.onnx.json").write_text("{}")
    assert "says how to run" in message(lambda: open_engine(path))
