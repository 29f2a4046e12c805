"""Quantizers where engines need them: found in the graph, calibrated and learned with the rest."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_networks import NETWORKS, SIZE, chained, conv, graph_of, images, outputs, same
from tiny_networks import message
from torch import Tensor, fx, nn

from zsq.graph.blocks import split
from zsq.graph.capture import capture
from zsq.graph.nodes import activations, aten, output_nodes, weight_node
from zsq.models import ModelSpec
from zsq.pipeline import compose_recipe
from zsq.quant.attach import attach
from zsq.quant.calibrate import calibrate
from zsq.quant.engine_placement import CARRIERS, CAT, place_for_engine
from zsq.quant.image_range import set_image_ranges
from zsq.quant.placement import place
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from zsq.quant.scheme import Scheme, parse_bits
from zsq.recipe import Calibration, Reconstruction
from zsq.recipe_fields import describe
from zsq.recover.reconstruct import reconstruct

W4A4 = parse_bits("W4A4", placement="engine")
W8A8 = parse_bits("W8A8", placement="engine")


def student_of(name: str, scheme: Scheme = W8A8) -> fx.GraphModule:
    student, _ = attach(graph_of(name), scheme)
    calibrate(student, [images(16)], Calibration(num_images=16))
    return student


def quantizer_of(student: fx.GraphModule, node: object) -> str | None:
    """The quantizer that a tensor's values come from; through what carries them."""
    while isinstance(node, fx.Node):
        if node.op == "call_module":
            return str(node.target)
        if node.target is CAT:
            found = {quantizer_of(student, part) for part in node.args[0]}  # type: ignore[union-attr]
            return found.pop() if len(found) == 1 else None
        node = node.args[0] if node.target in CARRIERS else None
    return None


def is_layer(student: fx.GraphModule, node: fx.Node) -> bool:
    weight = node.args[1] if len(node.args) > 1 else None
    if not isinstance(weight, fx.Node) or weight.op != "call_module":
        return False
    return isinstance(student.get_submodule(str(weight.target)), WeightQuantizer)


# ---- where they are


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_and_addition_reads_codes(name: str) -> None:
    student = student_of(name)
    tensors = set(activations(graph_of(name).graph))
    by_name = {n.name for n in tensors}
    for node in student.graph.nodes:
        if is_layer(student, node):
            assert quantizer_of(student, node.args[0]) is not None, node
        if node.target is aten.add.Tensor:
            original = next(n for n in tensors if n.name == node.name)
            if all(a in tensors for a in original.args[:2]):
                assert all(quantizer_of(student, a) is not None for a in node.args[:2]), node
    assert by_name >= set(place_for_engine(graph_of(name).graph, W8A8).activations)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_and_addition_gives_codes(name: str) -> None:
    """Whatever reads its result reads codes, after what engines fuse; the network's output may be float."""
    student = student_of(name)
    returned = {n.name for n in output_nodes(student.graph)}
    fused = {aten.batch_norm.default, aten.relu.default, aten.relu6.default, aten.hardtanh.default}

    def gives_codes(node: fx.Node) -> bool:
        readers = [u for u in node.users if u.target is not aten.sym_size.int]
        if len(readers) == 1 and readers[0].target in fused:
            return gives_codes(readers[0])
        return all(
            u.op in ("call_module", "output") or (u.target in CARRIERS and gives_codes(u)) for u in readers
        )

    for node in student.graph.nodes:
        if is_layer(student, node) and node.name not in returned:
            norms = [u for u in node.users if u.target is aten.batch_norm.default]
            if not norms or len(node.users) == 1:
                assert gives_codes(node), node


def test_a_residual_block() -> None:
    # conv1 bn relu | pool | per block: conv1 bn relu, conv2 bn, (shortcut bn,) relu(add) | average pool | fc
    graph = graph_of("resnet").graph
    placement = place_for_engine(graph, W4A4)
    kinds = {n.name: str(n.target) for n in graph.nodes}
    names = [kinds[tensor].removeprefix("aten.").removesuffix(".default") for tensor in placement.activations]
    block = ["relu", "batch_norm", "relu"]
    expected = ["x", "relu", *block, "relu", "batch_norm", "batch_norm", "relu", *block]
    assert names == [*expected, "adaptive_avg_pool2d"]
    bits = list(placement.activations.values())
    # The image, the second layer's input (also the first shortcut), the last layer's input: 8 bits.
    assert bits == [8, 8, *[4] * (len(bits) - 3), 8]
    assert placement.shared == {}


def test_equal_ends_keep_eight_bits_for_the_image_alone() -> None:
    bits = list(place_for_engine(graph_of("resnet").graph, replace(W4A4, ends="same")).activations.values())
    assert bits == [8, *[4] * (len(bits) - 1)]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_covers_the_placement_of_research(name: str) -> None:
    graph = graph_of(name).graph
    plain = place(graph, Scheme(weight_bits=4, activation_bits=4))
    student = student_of(name, W4A4)
    by_name = {n.name: n for n in student.graph.nodes}
    assert place_for_engine(graph, W4A4).weights == plain.weights
    for readers in plain.readers.values():
        for reader in readers:
            read = [a for a in by_name[reader].all_input_nodes if a.op != "get_attr"]
            assert any(quantizer_of(student, a) is not None for a in read) or (
                by_name[reader].target not in (aten.conv2d.default, aten.linear.default)
            )


class Joined(nn.Module):
    """Two branches and their input in a concatenation, a max pool, a local and a global average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(3, 4), conv(4, 4), conv(4, 4)
        self.after, self.fc = conv(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat(
            [
                F.max_pool2d(x, 2),
                F.max_pool2d(F.relu(self.left(x)), 2),
                F.silu(self.right(x[:, :, ::2, ::2])),
            ],
            1,
        )
        x = self.after(F.avg_pool2d(x, 2))
        return self.fc(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def joined() -> fx.GraphModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return capture(Joined().requires_grad_(False), SIZE)


def test_pools_and_concatenations_share_scales(joined: fx.GraphModule) -> None:
    placement = place_for_engine(joined.graph, W4A4)
    groups: dict[str, set[str]] = {}
    for tensor in placement.activations:
        groups.setdefault(placement.shared.get(tensor, tensor), set()).add(tensor)
    # The second one is that of the concatenation and of the local average pool after it.
    assert groups == {
        "x": {"x"},
        "relu": {"relu", "relu_1", "silu", "avg_pool2d"},
        "conv2d_2": {"conv2d_2"},
        "relu_2": {"relu_2"},
        "adaptive_avg_pool2d": {"adaptive_avg_pool2d"},
    }
    assert {placement.activations[t] for t in groups["relu"]} == {8}  # one member is the second layer's input
    assert placement.activations["conv2d_2"] == 4


def test_a_shared_range_fits_all_tensors(joined: fx.GraphModule) -> None:
    with torch.no_grad():
        joined.get_parameter("left.weight").mul_(20)  # the second member is much larger than the first
    student, quantizers = attach(joined, W8A8)
    calibrate(student, [images(8)], Calibration(num_images=8, method="minmax"))
    quantizer = student.get_submodule(quantizers.activations["relu"])
    assert quantizer is student.get_submodule(quantizers.activations["relu_1"])
    assert isinstance(quantizer, ActivationQuantizer)
    x = images(8)
    largest = float(
        F.relu(
            F.conv2d(
                F.relu(F.conv2d(x, joined.get_parameter("stem.weight"), padding=1)),
                joined.get_parameter("left.weight"),
                padding=1,
            )
        ).max()
    )
    assert float(quantizer.scale) * (255 - float(quantizer.zero_point)) == pytest.approx(largest, rel=0.05)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_returned_is_not_quantized(name: str) -> None:
    student = student_of(name)
    assert all(node.op != "call_module" for node in output_nodes(student.graph))


# ---- the student


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_stay_close_to_the_teacher(name: str) -> None:
    student = student_of(name)
    for wanted, got in zip(outputs(graph_of(name), images(16)), outputs(student, images(16)), strict=True):
        assert float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum())) > 25


@pytest.mark.parametrize("name", NETWORKS)
def test_chained_units_are_the_student(name: str) -> None:
    """Every quantizer call is in the unit of its reader, none is lost between units."""
    student = student_of(name, W4A4)
    for max_layers in (2, 8):
        units = split(graph_of(name).graph, max_layers=max_layers)
        assert same(chained(student, units, images(3)), outputs(student, images(3)))


@pytest.mark.parametrize("name, max_layers", [("resnet", 8), ("dense", 2), ("shuffle", 2)])
def test_every_range_belongs_to_exactly_one_unit(
    name: str, max_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = graph_of(name)
    student, quantizers = attach(teacher, W4A4)
    learned: list[int] = []
    adam = torch.optim.Adam

    def spy(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Adam:
        learned.extend(id(parameter) for parameter in groups[-1]["params"])
        return adam(groups, **settings)

    monkeypatch.setattr(torch.optim, "Adam", spy)
    scales = [m.scale for m in student.modules() if isinstance(m, ActivationQuantizer)]
    reconstruct(
        teacher,
        student,
        quantizers,
        split(teacher.graph, max_layers=max_layers),
        images(16),
        settings=Reconstruction(steps=2, batch_size=8),
        calibration=Calibration(num_images=16),
        seed=0,
        finished={},
        log=lambda *_: None,
    )
    assert sorted(learned) == sorted(id(scale) for scale in scales)
    assert all(bool(m.scale.isfinite()) for m in student.modules() if isinstance(m, ActivationQuantizer))


def test_a_range_across_units_fits_the_tensors_of_all() -> None:
    teacher = graph_of("dense")
    units = split(teacher.graph, max_layers=2)
    student, quantizers = attach(teacher, W8A8)
    reconstruct(
        teacher,
        student,
        quantizers,
        units,
        images(16),
        settings=None,
        calibration=Calibration(num_images=16, method="minmax"),
        seed=0,
        finished={},
        log=lambda *_: None,
    )
    placement = place_for_engine(teacher.graph, W8A8)
    shared = {
        first: [t for t, f in placement.shared.items() if f == first] for first in placement.shared.values()
    }
    assert shared
    values = _Values(teacher)
    with torch.no_grad():
        values.run(images(16))
    for first, others in shared.items():
        quantizer = student.get_submodule(quantizers.activations[first])
        assert isinstance(quantizer, ActivationQuantizer)
        largest = max(float(values.found[t].max()) for t in (first, *others))
        assert float(quantizer.scale) * (255 - float(quantizer.zero_point)) >= 0.99 * largest


class _Values(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n.name] = result
        return result


def test_images_have_the_range_of_pixels() -> None:
    teacher = graph_of("resnet")
    spec = ModelSpec(input_size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.5), crop_fraction=1.0)
    student, quantizers = attach(teacher, W4A4)
    set_image_ranges(teacher, student, quantizers, spec)
    quantizer = student.get_submodule(quantizers.activations["x"])
    assert isinstance(quantizer, ActivationQuantizer)
    codes = torch.tensor([0.0, 255.0])
    lo, hi = ((codes - quantizer.zero_point) * quantizer.scale).tolist()
    step = float(quantizer.scale)  # -2 .. 3: the lowest and highest value over channels
    assert lo == pytest.approx(-2, abs=step / 2) and hi == pytest.approx(3, abs=step / 2)
    reconstruct(
        teacher,
        student,
        quantizers,
        split(teacher.graph),
        0.1 * images(8),
        settings=Reconstruction(steps=2, batch_size=8),
        calibration=Calibration(num_images=8),
        seed=0,
        finished={},
        log=lambda *_: None,
    )
    assert float(quantizer.scale) == step  # neither calibrated nor learned
    assert all(bool(m.scale.isfinite()) for m in student.modules() if isinstance(m, ActivationQuantizer))


# ---- what users see


def test_the_default_is_what_it_was() -> None:
    assert Scheme().placement == "research" and parse_bits("W4A4") == Scheme()
    described = describe(compose_recipe("genie", bits="W4A4"))
    assert "placement" not in described["scheme"]  # earlier runs keep their identity
    engine = compose_recipe("genie", bits="W4A4", placement="engine")
    assert describe(engine)["scheme"]["placement"] == "engine"
    assert compose_recipe(engine, bits="W4A8").scheme == parse_bits("W4A8", placement="engine")


def test_wrong_placements() -> None:
    found = message(lambda: compose_recipe("genie", placement="tpu"))
    assert "research, engine" in found and "'tpu'" in found
    found = message(lambda: compose_recipe("genie", bits="W4", placement="engine"))
    assert "leaves them in float" in found and "W4A8" in found


def test_first_layers_are_found_without_a_name() -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = conv(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv((x - 0.5) / 0.25).mean((2, 3)))  # type: ignore[no-any-return]

    graph = capture(Normalising().requires_grad_(False), SIZE).graph
    placement = place_for_engine(graph, replace(W4A4, ends="same"))
    assert placement.activations == {"div": 8, "conv2d": 4, "mean": 4}
    assert not any(weight_node(n) for n in graph.nodes if n.name == "div")
