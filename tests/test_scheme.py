"""Which tensors get how many bits, layer by layer."""

from dataclasses import replace

import pytest
import torch.nn.functional as F
from graph_networks import NETWORKS, SIZE, conv, graph_of, node_of
from tiny_networks import message
from torch import Tensor, fx, nn

from zsq.graph.capture import capture
from zsq.graph.nodes import activations, aten, layer_name, output_nodes, weight_node
from zsq.quant.placement import Placement, place
from zsq.quant.scheme import ENDS, Scheme, parse_bits

W4A4 = Scheme(weight_bits=4, activation_bits=4)


@pytest.mark.parametrize(
    ("text", "weight_bits", "activation_bits"),
    [
        ("W4A4", 4, 4),
        ("w4a8", 4, 8),
        (" W2A4 ", 2, 4),
        ("W8A8", 8, 8),
        ("W3", 3, None),
        ("w02a3", 2, 3),
    ],
)
def test_bits_as_users_write_them(text: str, weight_bits: int, activation_bits: int | None) -> None:
    scheme = parse_bits(text)
    assert (scheme.weight_bits, scheme.activation_bits, scheme.ends) == (weight_bits, activation_bits, "8bit")
    assert parse_bits(scheme.bits, ends="same") == replace(scheme, ends="same")


@pytest.mark.parametrize(
    "text", ["", "4", "W", "A4", "W4A", "4W4A", "W4A4W4", "W-4A4", "W4.5", "int8", "W4/A4"]
)
def test_refuses_other_texts(text: str) -> None:
    found = message(lambda: parse_bits(text))
    assert repr(text) in found and "W4A4" in found and "W4 (weights only)" in found and "2 to 8" in found


@pytest.mark.parametrize("text", ["W1A4", "W9", "W4A1", "W4A16", "W0A0", "W32A32"])
def test_refuses_other_numbers(text: str) -> None:
    assert "between 2 and 8, got" in message(lambda: parse_bits(text))


def test_refuses_other_ends() -> None:
    found = message(lambda: Scheme(ends="none"))
    assert all(end in found for end in ENDS) and "'none'" in found
    assert Scheme().bits == "W4A4" and Scheme(activation_bits=None).bits == "W4"


def input_bits(graph: fx.Graph, placement: Placement, weight: str) -> int | None:
    """Bits of what a layer reads; through the moves that its quantizer is shared through."""
    node: object = node_of(graph, weight)
    while isinstance(node, fx.Node):
        for tensor, readers in placement.readers.items():
            if node.name in readers:
                return placement.activations[tensor]
        node = node.args[0] if node.args and weight_node(node.args[0]) is None else None  # type: ignore[arg-type]
    return None


def table(name: str, scheme: Scheme) -> dict[str, tuple[int, int | None]]:
    """Bits of weight and input of every layer."""
    graph = graph_of(name).graph
    placement = place(graph, scheme)
    layers = [n for n in graph.nodes if weight_node(n) is not None]
    return {
        layer_name(n): (placement.weights[n.name], input_bits(graph, placement, layer_name(n)))
        for n in layers
    }


RESNET = [
    "layer1.0.conv1",
    "layer1.0.conv2",
    "layer2.0.conv1",
    "layer2.0.conv2",
    "layer2.0.shortcut.0",
    "layer2.1.conv1",
    "layer2.1.conv2",
]


def test_placement_of_genie_on_a_resnet() -> None:
    # Genie's code, weights / input: first conv 8 / none, second layer 4 / 8, middle 4 / 4, last 8 / 8.
    middle = dict.fromkeys(RESNET, (4, 4))
    expected = {"conv1": (8, None), **middle, "layer1.0.conv1": (4, 8), "fc": (8, 8)}
    assert table("resnet", W4A4) == expected


def test_placement_with_equal_ends() -> None:
    middle: dict[str, tuple[int, int | None]] = dict.fromkeys(RESNET, (2, 4))
    scheme = Scheme(weight_bits=2, activation_bits=4, ends="same")
    assert table("resnet", scheme) == {"conv1": (2, None), **middle, "fc": (2, 4)}


def test_weights_only() -> None:
    placement = place(graph_of("resnet").graph, Scheme(weight_bits=4, activation_bits=None))
    assert placement.activations == {} == placement.readers
    assert list(placement.weights.values()) == [8, *[4] * 7, 8]


@pytest.mark.parametrize("ends", ENDS)
def test_eight_bits_everywhere(ends: str) -> None:
    placement = place(graph_of("resnet").graph, Scheme(weight_bits=8, activation_bits=8, ends=ends))
    assert set(placement.weights.values()) == {8} == set(placement.activations.values())


def additions(name: str) -> list[fx.Node]:
    return [n for n in graph_of(name).graph.nodes if n.target is aten.add.Tensor]


def tensor_read_by(placement: Placement, reader: str) -> list[str]:
    return [tensor for tensor, readers in placement.readers.items() if reader in readers]


def test_identity_shortcuts_share_the_quantizer_of_the_block_input() -> None:
    graph = graph_of("resnet").graph
    placement = place(graph, W4A4)
    first, projected, last = additions("resnet")
    for addition, weight in ((first, "layer1.0.conv1"), (last, "layer2.1.conv1")):
        tensors = tensor_read_by(placement, node_of(graph, weight).name)
        assert tensors == tensor_read_by(placement, addition.name) and len(tensors) == 1
        assert placement.readers[tensors[0]] == (node_of(graph, weight).name, addition.name)
    # Shared, so the first block's shortcut has the 8 bits of the second layer's input.
    assert placement.activations[tensor_read_by(placement, first.name)[0]] == 8
    assert placement.activations[tensor_read_by(placement, last.name)[0]] == 4
    assert tensor_read_by(placement, projected.name) == []


def test_projection_shortcuts_share_the_quantizer_of_the_block_input() -> None:
    graph = graph_of("resnet").graph
    placement = place(graph, W4A4)
    readers = {node_of(graph, f"layer2.0.{leaf}").name for leaf in ("conv1", "shortcut.0")}
    assert readers in [set(found) for found in placement.readers.values()]


def test_option_a_shortcuts_share_it_through_slice_and_pad() -> None:
    graph = graph_of("resnet_a").graph
    placement = place(graph, W4A4)
    (tensor,) = tensor_read_by(placement, node_of(graph, "layer2.0.conv1").name)
    main, shortcut = placement.readers[tensor]
    by_name = {n.name: n for n in graph.nodes}
    assert main == node_of(graph, "layer2.0.conv1").name
    assert by_name[shortcut].target is aten.slice.Tensor and by_name[shortcut].args[0] is by_name[tensor]
    assert tensor_read_by(placement, additions("resnet_a")[1].name) == []


def test_a_pad_before_the_convolution_shares_it_with_the_shortcut_convolution() -> None:
    graph = graph_of("tensorflow").graph
    placement = place(graph, W4A4)
    by_name = {n.name: n for n in graph.nodes}
    (tensor,) = tensor_read_by(placement, node_of(graph, "shortcut").name)
    readers = [by_name[name] for name in placement.readers[tensor]]
    assert {n.target for n in readers} == {aten.pad.default, aten.conv2d.default}
    assert by_name[tensor].target is aten.relu.default


@pytest.mark.parametrize("value", [0.5, -1.0])
def test_other_padding_than_zero_is_no_move(value: float) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.fc = conv(3, 4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(F.pad(F.relu(self.stem(x)), (1, 1, 1, 1), value=value)))  # type: ignore[no-any-return]

    graph = capture(Padded().requires_grad_(False), SIZE).graph
    (pad,) = (n for n in graph.nodes if n.target is aten.pad.default)
    assert pad.name in place(graph, W4A4).activations


def test_preactivation_nets_quantize_the_identity_shortcut() -> None:
    graph = graph_of("preactivation").graph
    placement = place(graph, W4A4)
    stem, first, projected = node_of(graph, "conv1"), *additions("preactivation")[::2]
    # The identity reads the stem's output itself, the convolution what BatchNorm and ReLU make of it.
    assert tensor_read_by(placement, first.name) == [stem.name]
    assert placement.readers[stem.name] == (first.name,)
    assert placement.activations[stem.name] == 8 == input_bits(graph, placement, "layer1.0.conv1")
    assert tensor_read_by(placement, projected.name) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_images_are_never_quantized(name: str) -> None:
    graph = graph_of(name).graph
    placement = place(graph, Scheme(weight_bits=2, activation_bits=2, ends="same"))
    image = activations(graph)[0]
    first = [n.name for n in graph.nodes if weight_node(n) is not None][0]
    assert image.name not in placement.activations
    assert first not in [reader for readers in placement.readers.values() for reader in readers]


def test_a_normalisation_inside_the_model_is_still_the_image() -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = conv(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv((x - 0.5) / 0.25).mean((2, 3)))  # type: ignore[no-any-return]

    graph = capture(Normalising().requires_grad_(False), SIZE).graph
    placement = place(graph, W4A4)
    assert list(placement.activations.values()) == [8] and list(placement.weights.values()) == [8, 8]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_but_the_first_reads_quantized_values(name: str) -> None:
    graph = graph_of(name).graph
    placement = place(graph, W4A4)
    by_name = {n.name: n for n in graph.nodes}
    layers = [n.name for n in graph.nodes if weight_node(n) is not None]
    assert list(placement.weights) == layers
    assert list(placement.readers) == list(placement.activations)
    for tensor, readers in placement.readers.items():
        assert len(set(readers)) == len(readers) > 0
        assert all(by_name[tensor] in by_name[reader].all_input_nodes for reader in readers)


def test_all_heads_are_last_layers() -> None:
    found = table("detector", W4A4)
    heads = ["boxes", "objects", "scores.2"]
    assert {head: found[head][0] for head in heads} == dict.fromkeys(heads, 8)
    assert found["stem"] == (8, None) and found["scores.0"][0] == 4 and found["lateral"][0] == 4
    # Three heads read one tensor: where they want different bits, the larger number holds.
    assert found["boxes"][1] == found["objects"][1] == found["scores.0"][1] == 8 == found["scores.2"][1]


def test_squeeze_and_excitation_is_in_the_middle() -> None:
    found = table("mobilenetv3", W4A4)
    assert {found[f"blocks.1.{leaf}"] for leaf in ("expand", "dw", "reduce", "widen", "project")} == {(4, 4)}
    assert found["stem"] == (8, None) and found["blocks.0.expand"] == (4, 8) and found["fc"] == (8, 8)


@pytest.mark.parametrize(("stream", "quantized"), [("float", 0), ("quantized", 1)])
def test_a_transformer_quantizes_its_stream_at_the_additions_if_it_is_told_to(
    stream: str, quantized: int
) -> None:
    graph = graph_of("transformer").graph
    placement = place(graph, replace(W4A4, residual_stream=stream))
    embedded, *blocks = additions("transformer")  # the first one adds positions, which are no shortcut
    assert tensor_read_by(placement, embedded.name) == []
    assert [len(tensor_read_by(placement, n.name)) for n in blocks] == [quantized] * 4


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 8), nn.RMSNorm((8, 16, 16))])
def test_a_stream_behind_any_normalisation_stays_in_float(norm: nn.Module) -> None:
    graph = capture(Stream(norm), SIZE).graph
    (added,) = (n for n in graph.nodes if n.target is aten.add.Tensor)
    assert tensor_read_by(place(graph, W4A4), added.name) == []
    assert len(tensor_read_by(place(graph, replace(W4A4, residual_stream="quantized")), added.name)) == 1


def test_a_shortcut_that_a_layer_reads_too_is_quantized_behind_a_normalisation() -> None:
    graph = capture(Stream(nn.GroupNorm(1, 8), gate=True), SIZE).graph
    (added,) = (n for n in graph.nodes if n.target is aten.add.Tensor)
    assert len(tensor_read_by(place(graph, W4A4), added.name)) == 1


def test_refuses_other_residual_streams() -> None:
    assert "one of float, quantized, got 'both'" in message(lambda: Scheme(residual_stream="both"))


class Stream(nn.Module):
    """A block that reads its input through a normalisation, and through a gate if it has one."""

    def __init__(self, norm: nn.Module, *, gate: bool = False) -> None:
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(8, 8, 1) if gate else None
        self.head = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        body = self.body(self.norm(x))
        if self.gate is not None:
            body = body * self.gate(x)
        return self.head(x + body)  # type: ignore[no-any-return]


def test_a_single_layer_is_first_and_last() -> None:
    placement = place(graph_of("linear").graph, W4A4)
    assert list(placement.weights.values()) == [8] and placement.activations == {}


def test_what_the_network_returns_is_not_quantized() -> None:
    graph = graph_of("pyramid").graph
    placement = place(graph, W4A4)
    assert output_nodes(graph)[-1].name not in placement.activations
    assert "output" not in [reader for readers in placement.readers.values() for reader in readers]
