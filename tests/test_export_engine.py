"""Students whose quantizers are placed for engines: the same numbers there, and everything in integers."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from graph_networks import NETWORKS, graph_of
from graph_networks import SIZE as GRAPH_SIZE
from quantization_networks import Residual, Tokens, images
from torch import fx, nn

from zsq.export.targets import TARGETS
from zsq.graph.capture import capture
from zsq.graph.nodes import LAYERS
from zsq.models import ModelSpec, load_model
from zsq.quant.attach import attach
from zsq.quant.calibrate import calibrate
from zsq.quant.engine_biases import round_biases
from zsq.quant.scheme import parse_bits
from zsq.recipe import Calibration
from zsq.run import Run

for package in ("onnx", "onnx_ir", "onnxruntime", "ml_dtypes"):
    pytest.importorskip(package)

import onnx  # noqa: E402
from test_export import FLOAT, PLACES, captured, exported, kinds, run_of, worst  # noqa: E402

from zsq.export import openvino  # noqa: E402
from zsq.export.engine import EngineModel  # noqa: E402
from zsq.export.integer import fused_operators, quantize_for_fusion, reads_codes  # noqa: E402
from zsq.export.openvino import OpenVinoModel  # noqa: E402
from zsq.export.prepare import prepared  # noqa: E402


def engine_run(graph: fx.GraphModule, bits: str, x: torch.Tensor) -> Run:
    """A calibrated student placed for engines, as a run without a record."""
    student, _ = attach(graph, parse_bits(bits, placement="engine"))
    calibrate(student, [x], Calibration(num_images=len(x)))
    round_biases(student)
    channels, height, width = x.shape[1:]
    spec = ModelSpec(
        input_size=(channels, height, width),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        crop_fraction=1.0,
    )
    return Run(student, {"bits": bits}, x, spec)


def noise(*size: int, count: int = 16) -> torch.Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target, container", PLACES)
@pytest.mark.parametrize("bits", ["W8A8", "W4A8", "W3A3", "W2A4"])
@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_parity(kind: type[nn.Module], bits: str, target: str, container: str | None, tmp_path: Path) -> None:
    run = engine_run(captured(kind), bits, images(48))
    export = exported(run, tmp_path, target=target, container=container)
    assert all(d.relative_error < FLOAT for d in export.verification.plain)
    # TensorRT's symmetric ranges are others than those that the biases were rounded for.
    assert worst(export) < (0.05 if target == "tensorrt" else FLOAT)


# Network -> convolutions and additions in float, which the network returns, and additions in integers.
EXPECTED = {
    "resnet": (0, 0, 3),
    "resnet_a": (0, 0, 3),
    "preactivation": (0, 0, 3),
    "separable": (0, 0, 0),
    "tensorflow": (0, 0, 1),
    "mobilenetv3": (0, 0, 2),
    "dense": (0, 0, 0),
    "shuffle": (0, 0, 0),
    "detector": (1, 0, 0),
    "pyramid": (1, 2, 0),
    "written": (0, 0, 1),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_convolutions_and_additions_are_fused(name: str, tmp_path: Path) -> None:
    export = exported(engine_run(graph_of(name), "W4A8", noise(*GRAPH_SIZE)), tmp_path, container="int8")
    fused = fused_operators(export.path.read_bytes(), export.verification.session)
    assert (fused.float_convolutions, fused.float_additions, fused.additions) == EXPECTED[name]
    assert fused.convolutions + fused.float_convolutions == kinds(export).count("Conv")


def test_the_bundled_network_is_fused_by_default(tmp_path: Path) -> None:
    teacher = load_model("digits")
    graph = capture(teacher.module, teacher.spec.input_size)
    run = engine_run(graph, "W8A8", noise(*teacher.spec.input_size))
    fused = fused_operators(exported(run, tmp_path).path.read_bytes())
    assert fused.complete and (fused.convolutions, fused.additions) == (9, 3)
    research = run_of(graph, "W8A8", noise(*teacher.spec.input_size))
    plain = fused_operators(exported(research, tmp_path, container="int8", force=True).path.read_bytes())
    assert not plain.complete and plain.additions == 0


def test_the_last_layer_is_computed_in_integers(tmp_path: Path) -> None:
    """Its bias is stored in 32 bits for that; in float its weight would be converted at every call."""
    run = engine_run(captured(Residual), "W8A8", images(8))
    content = exported(run, tmp_path).path.read_bytes()
    saved = tmp_path / "optimized.onnx"
    EngineModel(content, threads=1, saved=str(saved))
    found = [node.op_type for node in onnx.load(saved).graph.node]
    assert "QGemm" in found and "Gemm" not in found
    # A bias that is no multiple of the step stays as it is.
    bias = next(p for name, p in run.student.named_parameters() if "fc" in name and name.endswith("bias"))
    with torch.no_grad():
        bias += 0.3 * bias.abs().max()
    kept = exported(run, tmp_path, force=True).path.read_bytes()
    initializers = {t.name: t.data_type for t in onnx.load_from_string(kept).graph.initializer}
    assert onnx.TensorProto.INT32 not in initializers.values()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_timm_networks_are_fused(name: str, timm: ModuleType, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=5).eval().requires_grad_(False)
    run = engine_run(capture(network, (3, 64, 64)), "W8A8", noise(3, 64, 64, count=4))
    fused = fused_operators(exported(run, tmp_path).path.read_bytes())
    expected = {"resnet18": (20, 8), "mobilenetv2_100": (52, 10)}
    assert fused.complete and (fused.convolutions, fused.additions) == expected[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_quantizing_what_is_carried_changes_no_value(name: str) -> None:
    run = engine_run(graph_of(name), "W4A4", noise(*GRAPH_SIZE))
    student, _ = prepared(run.student, run.images, TARGETS["onnxruntime"])
    before = student(run.images)
    quantize_for_fusion(student)
    after = student(run.images)
    for a, b in zip(
        (before,) if isinstance(before, torch.Tensor) else before,
        (after,) if isinstance(after, torch.Tensor) else after,
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["resnet", "mobilenetv3", "tensorflow", "transposed", "reused"])
def test_biases_are_what_the_engine_adds(name: str, tmp_path: Path) -> None:
    """Without their rounding the file differs several times as much."""
    graph = graph_of(name)
    student, _ = attach(graph, parse_bits("W4A8", placement="engine"))
    x = noise(*GRAPH_SIZE)
    calibrate(student, [x], Calibration(num_images=len(x)))
    before = student(x)
    assert round_biases(student) > 0
    assert 0 < float((student(x) - before).norm() / before.norm()) < 0.05
    again = {n: t.clone() for n, t in student.state_dict().items()}
    round_biases(student)
    for key, tensor in student.state_dict().items():  # rounding twice is rounding once
        assert torch.allclose(tensor, again[key], rtol=1e-5, atol=1e-7)


def test_biases_after_concatenations() -> None:
    """Parts of a concatenation share a quantizer, whose scale the next layer's bias is rounded for."""
    student, _ = attach(graph_of("shuffle"), parse_bits("W8A8", placement="engine"))
    calibrate(student, [noise(*GRAPH_SIZE)], Calibration())
    layers = [n for n in student.graph.nodes if n.op == "call_function" and n.target in LAYERS]
    assert round_biases(student) == len(layers)


def test_placement_is_seen_in_the_student(tmp_path: Path) -> None:
    engine, research = (
        engine_run(captured(Residual), "W8A8", images(8)),
        run_of(captured(Residual), "W8A8", images(8)),
    )
    assert reads_codes(engine.student) and not reads_codes(research.student)
    export = exported(engine, tmp_path)
    assert "QLinearConv" not in kinds(export)  # the file has standard operators only


def test_openvino_without_its_transformations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In some networks its transformations to integers go wrong; then it is told to leave them out."""
    pytest.importorskip("openvino")
    forward = OpenVinoModel.forward
    asked: list[dict[str, str]] = []

    class Faulty(OpenVinoModel):
        def __init__(self, source: bytes | Path, properties: dict[str, str]) -> None:
            super().__init__(source, properties)
            asked.append(properties)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            right: torch.Tensor = forward(self, x)
            return right if "LP_TRANSFORMS_MODE" in asked[-1] else right + 1

    monkeypatch.setattr(openvino, "OpenVinoModel", Faulty)
    found = exported(engine_run(captured(Residual), "W4A8", images(8)), tmp_path, target="openvino")
    assert found.in_openvino is not None and found.in_openvino.properties["LP_TRANSFORMS_MODE"] == "NO"
    assert '"LP_TRANSFORMS_MODE": "NO"' in found.settings.read_text()
