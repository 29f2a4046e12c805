"""Which tensors fine-tuning looks at, found in graphs of several families."""

import pytest
import torch
from quantization_networks import SIZE, Block, ConvBn, Residual, Tokens, made
from torch import Tensor, fx, nn

from zsq.errors import UsageError
from zsq.graph.blocks import split
from zsq.graph.capture import capture
from zsq.recover.feature_nodes import attention_nodes, logits_node, map_node


class ConvolutionalClassifier(nn.Module):
    """A 1x1 convolution as classifier, after the pooling as in MobileNetV2 or before it as in SqueezeNet."""

    def __init__(self, pool_first: bool) -> None:
        super().__init__()
        self.pool_first = pool_first
        self.first, self.second = ConvBn(3, 6), ConvBn(6, 8)
        self.classifier = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        if self.pool_first:
            y: Tensor = self.classifier(x.mean((2, 3), keepdim=True)).flatten(1)
            return y
        return torch.relu(self.classifier(x)).mean((2, 3))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions without any addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(3, 6)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), ConvBn(6, 8, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.relu(self.block(torch.relu(self.stem(x)))).mean((2, 3)))
        return y


class LateShortcut(Block):
    """The projection runs after the body, so that its convolution is the last one of the block."""

    def forward(self, x: Tensor) -> Tensor:
        body = self.second(torch.relu(self.first(x)))
        return torch.relu(self.shortcut(x) + body)


class WithLateShortcut(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.block2 = LateShortcut(6, 10, 2)


def graph_of(network: nn.Module) -> fx.GraphModule:
    return capture(network.eval().requires_grad_(False), SIZE)


def weight_of(graph: fx.Graph, name: str) -> str:
    """Name of the weight of the convolution that a node is, or normalises."""
    node = next(n for n in graph.nodes if n.name == name)
    layer = node if node.target is torch.ops.aten.conv2d.default else node.args[0]
    assert isinstance(layer, fx.Node) and isinstance(layer.args[1], fx.Node)
    return str(layer.args[1].target)


@pytest.mark.parametrize("pool_first", [True, False])
def test_a_convolution_as_classifier_is_not_taken(pool_first: bool) -> None:
    graph = graph_of(ConvolutionalClassifier(pool_first)).graph
    assert weight_of(graph, map_node(graph)) == "second.conv.weight"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Residual, "block2.second.conv.weight"),
        (WithLateShortcut, "block2.second.conv.weight"),
        (Separable, "block.2.conv.weight"),
        (Tokens, "embed.weight"),
    ],
)
def test_maps_have_positions(kind: type[nn.Module], expected: str) -> None:
    graph = graph_of(made(kind)).graph
    found = next(n for n in graph.nodes if n.name == map_node(graph))
    assert found.meta["val"].shape[2] * found.meta["val"].shape[3] > 1
    assert weight_of(graph, found.name) == expected


def test_bodies_of_blocks_with_their_batch_norm() -> None:
    """The end of the longest chain of layers, whatever the order of body and projection."""
    for kind in (Residual, WithLateShortcut):
        graph = graph_of(made(kind)).graph
        names = attention_nodes(graph, split(graph))
        assert [weight_of(graph, name) for name in names] == [
            "block1.second.conv.weight",
            "block2.second.conv.weight",
        ]
        nodes = {n.name: n for n in graph.nodes}
        assert all("batch_norm" in str(nodes[name].target) for name in names)


def test_networks_without_blocks() -> None:
    graph = graph_of(made(Separable)).graph
    assert [weight_of(graph, n) for n in attention_nodes(graph, split(graph))] == ["block.2.conv.weight"]
    tokens = graph_of(made(Tokens)).graph
    assert [weight_of(tokens, n) for n in attention_nodes(tokens, split(tokens))] == ["embed.weight"]


def test_models_that_have_not_what_is_looked_at() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x.flatten(1))
            return y

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y

    linear = graph_of(Linear()).graph
    assert logits_node(linear)
    with pytest.raises(UsageError, match="no convolution with more than one position"):
        map_node(linear)
    with pytest.raises(UsageError, match="no convolution whose channels"):
        attention_nodes(linear, split(linear))
    with pytest.raises(UsageError, match="class logits"):
        logits_node(graph_of(Segmenter()).graph)
