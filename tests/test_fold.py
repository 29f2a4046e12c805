"""Folding BatchNorm: the output stays, and what is said to be foldable is folded."""

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_networks import NETWORKS, SIZE, conv, graph_of, images, network, outputs, randomised
from torch import Tensor, fx, nn

from zsq.graph.capture import capture
from zsq.graph.fold import BATCH_NORM, batch_norm_pairs, fold_batch_norms
from zsq.graph.nodes import layer_name, module_path
from zsq.graph.tensors import get_tensor

# How many BatchNorms a network has, and how many of them can be folded.
COUNTS = {
    "resnet": (8, 8),
    "resnet_a": (7, 7),
    "preactivation": (7, 3),
    "separable": (7, 7),
    "after_relu": (2, 0),
    "mobilenetv3": (7, 7),
    "dense": (13, 6),
    "transposed": (4, 4),
    "reused": (2, 2),
    "functional": (1, 1),
    "gated": (0, 0),
}


def left(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.target is BATCH_NORM]


def assert_close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)  # a few roundings of float32 a layer


@pytest.mark.parametrize("name", NETWORKS)
def test_keeps_the_output_and_the_original(name: str) -> None:
    graph, x = graph_of(name), images(3)
    text, before = str(graph.graph), outputs(graph, x)
    state = {k: v.clone() for k, v in graph.state_dict().items()}
    folded, pairs = fold_batch_norms(graph)
    assert_close(outputs(folded, x), before)
    assert str(graph.graph) == text and all(torch.equal(v, state[k]) for k, v in graph.state_dict().items())
    assert left(folded.graph) == [pair.batch_norm for pair in pairs if pair.layer is None]
    assert pairs == batch_norm_pairs(graph.graph)


@pytest.mark.parametrize("name", COUNTS)
def test_says_which_can_be_folded(name: str) -> None:
    pairs = batch_norm_pairs(graph_of(name).graph)
    assert (len(pairs), sum(pair.layer is not None for pair in pairs)) == COUNTS[name]


def test_pairs_are_of_neighbours() -> None:
    graph = graph_of("preactivation").graph
    by_name = {node.name: node for node in graph.nodes}
    found = {
        module_path(by_name[p.batch_norm]): p.layer and layer_name(by_name[p.layer])
        for p in batch_norm_pairs(graph)
    }
    assert found["layer1.0.bn2"] == "layer1.0.conv1" and found["layer2.0.bn2"] == "layer2.0.conv1"
    assert found["layer1.0.bn1"] is None and found["layer2.0.bn1"] is None and found["bn"] is None


def test_formula() -> None:
    module = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.5)))
    layer, norm = module[0], module[1]  # type: ignore[index]
    folded, _ = fold_batch_norms(capture(module, SIZE))
    factor = norm.weight / torch.sqrt(norm.running_var + 0.5)
    torch.testing.assert_close(get_tensor(folded, "0.weight"), layer.weight * factor.view(4, 1, 1, 1))
    torch.testing.assert_close(
        get_tensor(folded, "0.bias"), (layer.bias - norm.running_mean) * factor + norm.bias
    )


def test_layers_keep_their_names() -> None:
    folded, _ = fold_batch_norms(graph_of("resnet"))
    names = {name for name, _ in folded.named_parameters()}
    assert {"conv1.weight", "conv1.bias", "layer2.0.shortcut.0.bias", "fc.bias"} <= names
    assert not any("bn" in name for name in (*names, *dict(folded.named_buffers())))


def test_a_layer_that_is_used_twice_gets_two_weights() -> None:
    folded, _ = fold_batch_norms(graph_of("reused"))
    weights = [n for n, _ in folded.named_parameters() if n.startswith("conv.") and "bias" not in n]
    assert len(weights) == 2
    assert not torch.equal(*(get_tensor(folded, name) for name in weights))


def test_a_bias_that_two_layers_share_stays_for_the_other() -> None:
    folded, _ = fold_batch_norms(graph_of("functional"))
    assert torch.equal(get_tensor(folded, "bias"), get_tensor(network("functional"), "bias"))


class Wired(nn.Module):
    """A forward that is given from outside."""

    def __init__(self, forward: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def two_readers(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) + y  # type: ignore[no-any-return]


def returned_before(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = net.conv(x)
    return y, net.norm(y)


def after_pool(net: Any, x: Tensor) -> Tensor:
    return net.norm(F.avg_pool2d(net.conv(x), 2))  # type: ignore[no-any-return]


def directly(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.conv(x))  # type: ignore[no-any-return]


def over_rows(net: Any, x: Tensor) -> Tensor:
    return net.norm(net.linear(x.mean(1)))  # type: ignore[no-any-return]


def functional_norm(net: Any, x: Tensor) -> Tensor:
    norm = net.norm
    return F.batch_norm(net.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)


@pytest.mark.parametrize(
    ("module", "foldable"),
    [
        (Wired(two_readers, conv=conv(3, 4), norm=nn.BatchNorm2d(4)), False),
        (Wired(returned_before, conv=conv(3, 4), norm=nn.BatchNorm2d(4)), False),
        (Wired(after_pool, conv=conv(3, 4), norm=nn.BatchNorm2d(4)), False),
        (Wired(directly, conv=conv(3, 4), norm=nn.BatchNorm2d(4, track_running_stats=False)), False),
        # (N, 16, 6): the linear layer has 6 channels, the BatchNorm counts the 16 rows.
        (Wired(over_rows, linear=nn.Linear(16, 6), norm=nn.BatchNorm1d(16)), False),
        (Wired(over_rows, linear=nn.Linear(16, 16), norm=nn.BatchNorm1d(16)), False),
        (Wired(directly, conv=conv(3, 4), norm=nn.BatchNorm2d(4)), True),
        (Wired(directly, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4, affine=False)), True),
        (Wired(directly, conv=nn.Conv2d(3, 6, 3, groups=3), norm=nn.BatchNorm2d(6)), True),
        (Wired(directly, conv=nn.Conv2d(3, 3, 3, groups=3, bias=False), norm=nn.BatchNorm2d(3)), True),
        (Wired(directly, conv=nn.Conv2d(3, 4, 3, padding="same"), norm=nn.BatchNorm2d(4)), True),
        (Wired(directly, conv=nn.ConvTranspose2d(3, 6, 3, groups=3), norm=nn.BatchNorm2d(6)), True),
        (Wired(directly, conv=nn.ConvTranspose2d(3, 4, 3, 2, bias=False), norm=nn.BatchNorm2d(4)), True),
        (Wired(functional_norm, conv=conv(3, 4), norm=nn.BatchNorm2d(4)), True),
    ],
)
def test_foldable_or_not(module: nn.Module, foldable: bool) -> None:
    graph = capture(randomised(module), SIZE)
    folded, (pair,) = fold_batch_norms(graph)
    assert (pair.layer is not None) == foldable == (not left(folded.graph))
    assert_close(outputs(folded, images(3)), outputs(graph, images(3)))


def test_batch_norm_with_activation_of_timm(timm: ModuleType) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = randomised(timm.create_model("mobilenetv2_100", num_classes=10))
    size = (3, 32, 32)
    graph = capture(module, size)
    folded, pairs = fold_batch_norms(graph)
    assert len(pairs) == 52 and not left(folded.graph)
    wanted, got = outputs(graph, images(2, size))[0], outputs(folded, images(2, size))[0]
    assert float((wanted - got).norm() / wanted.norm()) < 1e-4  # 52 layers of float32 roundings
