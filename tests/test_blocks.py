"""Units: they tile the graph, and a network computed unit by unit is the network."""

import pytest
import torch
from graph_networks import NETWORKS, SIZE, Dense, chained, graph_of, images, outputs, randomised, same
from torch import Tensor, fx, nn

from zsq.graph.blocks import Unit, extract, last_readers, split
from zsq.graph.capture import capture
from zsq.graph.fold import fold_batch_norms
from zsq.graph.nodes import activations, aten, layer_name, module_path, output_nodes, weight_node

# Name of every unit, and its layers without that name.
EXPECTED: dict[str, list[tuple[str, list[str]]]] = {
    "resnet": [
        ("conv1", [""]),
        ("layer1.0", ["conv1", "conv2"]),
        ("layer2.0", ["conv1", "conv2", "shortcut.0"]),
        ("layer2.1", ["conv1", "conv2"]),
        ("fc", [""]),
    ],
    "resnet_a": [
        ("conv1", [""]),
        ("layer1.0", ["conv1", "conv2"]),
        ("layer2.0", ["conv1", "conv2"]),
        ("layer2.1", ["conv1", "conv2"]),
        ("fc", [""]),
    ],
    "preactivation": [
        ("conv1", [""]),
        ("layer1.0", ["conv1", "conv2"]),
        ("layer1.1", ["conv1", "conv2"]),
        ("layer2.0", ["conv1", "conv2", "shortcut"]),
        ("fc", [""]),
    ],
    "separable": [
        ("conv1", [""]),
        ("blocks.0", ["dw", "pw"]),
        ("blocks.1", ["dw", "pw"]),
        ("blocks.2", ["dw", "pw"]),
        ("fc", [""]),
    ],
    "after_relu": [("conv1", [""]), ("conv2", [""]), ("fc", [""])],
    "mobilenetv3": [
        ("stem", [""]),
        ("blocks.0", ["expand", "dw", "reduce", "widen", "project"]),
        ("blocks.1", ["expand", "dw", "reduce", "widen", "project"]),
        ("head", [""]),
        ("fc", [""]),
    ],
    "shuffle": [
        ("stem", [""]),
        ("blocks.0.branch", ["0", "3"]),
        ("blocks.1.branch", ["0", "3"]),
        ("fc", [""]),
    ],
    "gated": [
        ("conv1", [""]),
        ("l1", ["dw", "fc1", "fc2"]),
        ("l2", ["dw", "fc1", "fc2"]),
        ("fc", [""]),
    ],
    "transformer": [
        ("patches", [""]),
        ("blocks.0.attn", ["qkv", "proj"]),
        ("blocks.0", ["fc1", "fc2"]),
        ("blocks.1.attn", ["qkv", "proj"]),
        ("blocks.1", ["fc1", "fc2"]),
        ("head", [""]),
    ],
    "linear": [("fc", [""])],
    "conv": [("weight", [""])],
}


def layers_of(name: str, unit: Unit) -> list[str]:
    by_name = {n.name: n for n in graph_of(name).graph.nodes}
    return [layer_name(by_name[layer]) for layer in unit.layers]


def unit_with(units: tuple[Unit, ...], node: str) -> int:
    return next(i for i, unit in enumerate(units) if node in unit.nodes)


@pytest.mark.parametrize("max_layers", [2, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_units_tile_the_graph(name: str, max_layers: int) -> None:
    graph = graph_of(name).graph
    units = split(graph, max_layers=max_layers)
    assert [n for unit in units for n in unit.nodes] == [n.name for n in activations(graph)[1:]]
    layers = [n.name for n in graph.nodes if weight_node(n) is not None]
    assert [n for unit in units for n in unit.layers] == layers
    assert all(unit.layers for unit in units) and len({unit.name for unit in units}) == len(units)


@pytest.mark.parametrize("max_layers", [2, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_chained_units_are_the_network_bit_for_bit(name: str, max_layers: int) -> None:
    graph = graph_of(name)
    units = split(graph.graph, max_layers=max_layers)
    for count in (1, 3):
        assert same(chained(graph, units, images(count)), outputs(graph, images(count)))


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_networks_have_the_same_units(name: str) -> None:
    folded, _ = fold_batch_norms(graph_of(name))
    before, after = split(graph_of(name).graph), split(folded.graph)
    assert [(u.name, u.layers) for u in before] == [(u.name, u.layers) for u in after]
    assert same(chained(folded, after, images(3)), outputs(folded, images(3)))


@pytest.mark.parametrize("name", EXPECTED)
def test_expected_units(name: str) -> None:
    units = split(graph_of(name).graph)
    found = [(unit.name, layers_of(name, unit)) for unit in units]
    expected = [(base, [f"{base}.{leaf}".rstrip(".") for leaf in leaves]) for base, leaves in EXPECTED[name]]
    if name == "transformer":  # attention and the part after it have names that begin alike
        found = [(base.removesuffix("#2"), layers) for base, layers in found]
    assert found == expected


@pytest.mark.parametrize("name", ["resnet", "resnet_a", "separable", "after_relu", "mobilenetv3", "written"])
def test_single_tensors_between_units(name: str) -> None:
    units = split(graph_of(name).graph)
    assert all(len(unit.inputs) == len(unit.outputs) == 1 for unit in units)
    assert [u.inputs for u in units[1:]] == [u.outputs for u in units[:-1]]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "preactivation"])
def test_batch_norm_and_relu_stay_with_the_layer_before(name: str) -> None:
    graph = graph_of(name).graph
    units = split(graph)
    for node in activations(graph):
        if node.target in (aten.batch_norm.default, aten.relu.default, aten.relu6.default):
            before = node.args[0]
            assert isinstance(before, fx.Node)
            assert unit_with(units, node.name) == unit_with(units, before.name)


def test_batch_norm_after_relu_stays_with_its_convolution() -> None:
    graph = graph_of("after_relu").graph
    units = split(graph)
    norms = [n.name for n in graph.nodes if n.target is aten.batch_norm.default]
    assert [unit_with(units, n) for n in norms] == [0, 1]


def test_first_batch_norm_of_a_preactivation_block_belongs_to_the_block() -> None:
    graph = graph_of("preactivation").graph
    units = split(graph)
    names = {module_path(n): units[unit_with(units, n.name)].name for n in graph.nodes if "norm" in n.name}
    assert names["layer1.0.bn1"] == "layer1.0" and names["layer2.0.bn1"] == "layer2.0"


@pytest.mark.parametrize(
    ("name", "operation", "unit"),
    [
        ("resnet", aten.max_pool2d.default, "layer1.0"),
        ("resnet", aten.flatten.using_ints, "fc"),
        ("resnet", aten.adaptive_avg_pool2d.default, "fc"),
        ("separable", aten.mean.dim, "fc"),
        ("linear", aten.flatten.using_ints, "fc"),
    ],
)
def test_what_changes_the_shape_goes_to_the_next_unit(name: str, operation: object, unit: str) -> None:
    graph = graph_of(name).graph
    units = split(graph)
    (node,) = (n for n in graph.nodes if n.target is operation)
    assert units[unit_with(units, node.name)].name == unit


def test_pads_go_with_the_convolution_they_feed() -> None:
    graph = graph_of("separable").graph
    units = split(graph)
    pads = [n for n in graph.nodes if n.target is aten.pad.default]
    assert [units[unit_with(units, n.name)].name for n in pads] == ["conv1", "blocks.1"]


def test_dense_blocks_are_capped_where_several_tensors_are_live() -> None:
    units = split(graph_of("dense").graph)
    inner = [u for u in units if u.name.startswith("block")]
    assert len(inner) > 1 and all(len(u.layers) <= 8 for u in units)
    assert sum(len(u.layers) for u in inner) == 12
    assert any(len(u.inputs) > 1 for u in inner) and any(len(u.outputs) > 1 for u in inner)
    assert len(split(graph_of("dense").graph, max_layers=100)) == 3


def test_the_cap_is_a_parameter() -> None:
    graph = capture(randomised(Dense(4)), SIZE).graph
    for cap in (2, 4, 8):
        assert max(len(unit.layers) for unit in split(graph, max_layers=cap, max_merged=2)) == cap


def test_a_tensor_that_is_returned_does_not_keep_units_together() -> None:
    units = split(graph_of("pyramid").graph)
    assert [unit.name for unit in units] == ["stem", "block1", "block2"]
    assert [len(unit.outputs) for unit in units] == [1, 1, 1]


def test_heads_of_a_detector_are_outputs_of_units() -> None:
    units = split(graph_of("detector").graph)
    returned = {n.name for n in output_nodes(graph_of("detector").graph)}
    assert returned <= {name for unit in units for name in unit.outputs}
    assert sum(len(unit.layers) for unit in units) == 7


def test_single_layers_of_one_module_merge_up_to_a_limit() -> None:
    layers = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(6)]
    module = nn.ModuleDict({"a": nn.Sequential(*layers[:2]), "b": nn.Sequential(*layers[2:])})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, x: Tensor) -> Tensor:
            return module["b"](module["a"](x))  # type: ignore[no-any-return]

    graph = capture(Net().requires_grad_(False), SIZE).graph
    assert [(u.name, len(u.layers)) for u in split(graph)] == [("parts.a", 2), ("parts.b", 4)]
    assert [len(u.layers) for u in split(graph, max_merged=3)] == [2, 1, 1, 1, 1]
    assert [len(u.layers) for u in split(graph, max_merged=1)] == [1] * 6


def test_a_layer_without_weights_in_the_graph_is_refused() -> None:
    module = nn.Sequential(nn.ReLU(), nn.Flatten())
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        split(capture(module, SIZE).graph)


def test_extract_shares_tensors_and_leaves_the_graph_as_it_is() -> None:
    graph = graph_of("resnet")
    before = str(graph.graph)
    unit = split(graph.graph)[1]
    part = extract(graph, unit.inputs, unit.outputs)
    assert str(graph.graph) == before
    own = {t.data_ptr() for t in (*graph.parameters(), *graph.buffers())}
    held = [t.data_ptr() for t in (*part.parameters(), *part.buffers())]
    assert set(held) <= own and len(held) == 10  # two weights, two BatchNorms of four tensors
    assert isinstance(part(torch.zeros(2, 8, 8, 8)), tuple)


def test_extract_passes_gradients_to_its_inputs() -> None:
    graph = graph_of("transformer")
    unit = split(graph.graph)[1]
    (name,) = unit.inputs
    shape = next(n.meta["val"].shape for n in graph.graph.nodes if n.name == name)
    x = torch.randn(2, *shape[1:], requires_grad=True)
    extract(graph, unit.inputs, unit.outputs)(x)[0].square().sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_extract_refuses_what_its_inputs_do_not_determine() -> None:
    graph = graph_of("transformer")
    first, second = split(graph.graph)[:2]
    with pytest.raises(ValueError, match="not computed from"):
        extract(graph, second.outputs, first.outputs)


def test_last_readers() -> None:
    units = split(graph_of("dense").graph)
    last = last_readers(units)
    for name, index in last.items():
        assert name in units[index].inputs
        assert not any(name in unit.inputs for unit in units[index + 1 :])
    assert max(last.values()) == len(units) - 1
