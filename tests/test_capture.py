"""Capture: the graph computes what the module does, on its very tensors; what cannot be captured is said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_networks import NETWORKS, SIZE, conv, graph_of, images, network, outputs, same
from tiny_networks import message
from torch import Tensor, nn

from zsq.graph.capture import capture
from zsq.graph.nodes import activations, aten, layer_name, module_path, output_nodes, weight_node
from zsq.graph.tensors import device_of, get_tensor
from zsq.quant.attach import attach
from zsq.quant.scheme import Scheme

# Their fused attention is written out.
ROUNDED_OTHERWISE = ("transformer", "positions")


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_what_the_module_computes_for_any_batch_size(name: str) -> None:
    for count in (1, 2, 5):
        x = images(count)
        found, wanted = outputs(graph_of(name), x.clone()), outputs(network(name), x.clone())
        if name in ROUNDED_OTHERWISE:
            torch.testing.assert_close(found, wanted)
        else:
            assert same(found, wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_holds_the_modules_own_tensors_and_nothing_impure(name: str) -> None:
    own = {t.data_ptr() for t in (*network(name).parameters(), *network(name).buffers())}
    nodes = list(graph_of(name).graph.nodes)
    for node in nodes:
        if node.op == "get_attr":
            constant = "constant_" in str(node.target)
            assert (get_tensor(graph_of(name), str(node.target)).data_ptr() in own) != constant
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable and "dropout" not in str(node.target)
        assert node.op != "call_module" and (node.users or node.op == "output")
    assert [n.op for n in nodes].count("placeholder") == 1


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 9, 7), (1, 15, 13)])
def test_gray_images_and_odd_sizes(size: tuple[int, int, int]) -> None:
    module = nn.Sequential(
        nn.Conv2d(size[0], 4, 3, 2, 1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    graph = capture(module.requires_grad_(False), size)
    for count in (1, 4):
        assert same(outputs(graph, images(count, size)), outputs(module, images(count, size)))
    (image,) = (n for n in graph.graph.nodes if n.op == "placeholder")
    assert tuple(image.meta["val"].shape[1:]) == size


def test_captures_in_eval_mode() -> None:
    module = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Dropout(0.9)).train()
    graph = capture(module, SIZE)
    assert not module.training and same(outputs(graph, images(2)), outputs(module, images(2)))


def test_weights_that_depend_on_parameters_only_become_constants_of_their_layer() -> None:
    graph = graph_of("standardised").graph
    layers = [n for n in graph.nodes if weight_node(n) is not None]
    assert [layer_name(n) for n in layers] == ["stage.0", "stage.2", "fc"]
    assert [str(weight_node(n)).startswith("stage") for n in layers] == [True, True, False]
    read = weight_node(layers[0])
    assert read is not None
    weight = get_tensor(graph_of("standardised"), str(read.target))
    # Standardised: mean 0 and (unbiased) variance 1 for every output channel.
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(weight.var((1, 2, 3)), torch.ones(8), rtol=0, atol=1e-2)
    assert not any(n.target is aten.var_mean.correction for n in graph.nodes)


def test_names_of_layers_and_modules() -> None:
    graph = graph_of("resnet").graph
    layers = [n for n in graph.nodes if weight_node(n) is not None]
    names = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"]
    names += ["layer2.0.shortcut.0", "layer2.1.conv1", "layer2.1.conv2", "fc"]
    assert [layer_name(n) for n in layers] == names
    assert [module_path(n) for n in layers] == names
    norms = [module_path(n) for n in graph.nodes if n.target is aten.batch_norm.default]
    assert norms[:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    with pytest.raises(ValueError, match="no weight"):
        layer_name(output_nodes(graph)[0].all_input_nodes[0])


def test_layers_without_a_module() -> None:
    graph = graph_of("functional").graph
    layers = [n for n in graph.nodes if weight_node(n) is not None]
    assert [layer_name(n) for n in layers] == ["weight", "weight2", "classes"]
    assert [layer_name(n) for n in graph_of("conv").graph.nodes if weight_node(n) is not None] == ["weight"]


def test_a_reused_layer_is_two_nodes_of_one_weight() -> None:
    graph = graph_of("reused").graph
    layers = [n for n in graph.nodes if weight_node(n) is not None]
    assert [layer_name(n) for n in layers] == ["stem", "conv", "conv", "fc"]
    assert sum(n.target is aten.relu.default for n in graph.nodes) == 3


def test_nested_outputs_become_a_flat_tuple() -> None:
    graph = graph_of("detector")
    assert [tuple(t.shape) for t in graph(images(2))] == [(2, 4, 8, 8), (2, 1, 8, 8), (2, 6, 8, 8)]
    assert len(output_nodes(graph.graph)) == 3


def test_activations_are_what_depends_on_the_images() -> None:
    graph = graph_of("transformer").graph
    found = activations(graph)
    assert found[0].op == "placeholder" and all(
        isinstance(n.meta["val"], (Tensor, list, tuple)) for n in found
    )
    # The class token depends on the number of images, not on them.
    assert not any(n.target in (aten.expand.default, aten.sym_size.int) for n in found)
    assert any(n.target is aten.expand.default for n in graph.nodes)


def test_device_and_tensors_by_name() -> None:
    module = nn.Sequential(conv(3, 4))
    assert device_of(module) == torch.device("cpu") == device_of(nn.ReLU())
    assert get_tensor(module, "0.weight") is module[0].weight
    with pytest.raises(ValueError, match="0.stride"):
        get_tensor(module, "0.stride")


class Broken(nn.Module):
    """A forward that is given from outside."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.fc, self.function = conv(3, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def pooled(net: Any, x: Tensor) -> Tensor:
    return net.conv(x).mean((2, 3))  # type: ignore[no-any-return]


def branches_on_a_value(net: Any, x: Tensor) -> Tensor:
    y = pooled(net, x)
    if y.sum() > 0:
        y = y * 2
    return net.fc(y)  # type: ignore[no-any-return]


def branches_on_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.fc(pooled(net, x * 2 if x.shape[0] == 2 else x))  # type: ignore[no-any-return]


def fixes_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.fc(pooled(net, x).view(2, 4))  # type: ignore[no-any-return]


def writes_to_a_view(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, 0] = 0
    return net.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


def draws_numbers(net: Any, x: Tensor) -> Tensor:
    return net.fc(pooled(net, x)) + torch.rand(2)  # type: ignore[no-any-return]


def leaves_torch(net: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(pooled(net, x).numpy())


def returns_no_tensor(net: Any, x: Tensor) -> Any:
    return {"classes": 2}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Broken(branches_on_a_value), ["values in a tensor", "test_capture.py, line", "torch.where"]),
        (Broken(branches_on_the_batch), ["depends on the number of images", "any batch size"]),
        (Broken(fixes_the_batch), ["depends on the number of images", "x.flatten(1)"]),
        (Broken(writes_to_a_view), ["does not compute what the model computes", "in place"]),
        (Broken(draws_numbers), ["does not compute what the model computes", "random numbers"]),
        (Broken(leaves_torch), ["cannot capture", "numpy", "plain tensor operations"]),
        (Broken(returns_no_tensor), ["returns no tensor"]),
        (TwoInputs(), ["takes (x:", "y:", "one image tensor"]),
        (nn.Conv2d(5, 4, 3), ["cannot capture", "(3, 16, 16)", "Check the input size"]),
    ],
)
def test_says_what_cannot_be_captured(
    module: nn.Module, expected: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    text = message(lambda: capture(module.requires_grad_(False), SIZE))
    assert all(part in text for part in expected), text
    assert "Traceback" not in text and "TORCH_LOGS" not in text and len(text) < 600
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""  # torch.export prints the graph of a failure otherwise


def test_padding_by_name_is_a_layer() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding="valid"))
    graph = capture(module.requires_grad_(False), SIZE).graph
    assert [layer_name(n) for n in graph.nodes if weight_node(n) is not None] == ["0", "1"]


def test_attention_of_torch_is_made_of_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)  # has a fused fast path

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.fc(net.layer(F.avg_pool2d(x, 4).flatten(2)[:, :, :8]))  # type: ignore[no-any-return]

    module = Broken(forward)
    module.layer, module.fc = layer, nn.Linear(8, 2)
    graph = capture(module.requires_grad_(False), SIZE).graph
    names = [layer_name(n) for n in graph.nodes if weight_node(n) is not None]
    assert names == ["layer.self_attn", "layer.self_attn.out_proj", "layer.linear1", "layer.linear2", "fc"]


def test_what_is_the_same_for_all_images_is_computed_once() -> None:
    graph = graph_of("positions")
    names = [layer_name(n) for n in graph.graph.nodes if weight_node(n) is not None]
    assert names == ["patches", "attn.qkv", "attn.proj", "head"]  # and no layer of positions
    (constant,) = (n for n in graph.graph.nodes if "constant_" in str(n.target))
    assert get_tensor(graph, str(constant.target)).shape == (1, 8, 4, 4)
    (expanded,) = constant.users
    assert expanded.target is aten.expand.default and expanded not in activations(graph.graph)


def per_image(net: Any, x: Tensor) -> Tensor:
    """What is made for every image differs from image to image."""
    order = torch.arange(x.shape[0], dtype=x.dtype, device=x.device)[:, None]
    return net.fc(x.mean((2, 3))) + net.embed(order)  # type: ignore[no-any-return]


def test_what_differs_between_images_is_not() -> None:
    module = Broken(per_image)
    module.fc, module.embed = nn.Linear(3, 2), nn.Linear(1, 2)
    graph = capture(module.requires_grad_(False), SIZE)
    for count in (1, 4):
        assert same(outputs(graph, images(count)), outputs(module, images(count)))
    student, quantizers = attach(graph, Scheme())
    assert list(quantizers.weights) == ["linear"] and outputs(student, images(2))[0].shape == (2, 2)


def counted(net: Any, x: Tensor) -> Tensor:
    net.calls.add_(1)
    return net.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_what_a_forward_writes_over_is_not_written_by_the_capture() -> None:
    module = Broken(counted)
    module.fc = nn.Linear(3, 2)
    module.register_buffer("calls", torch.zeros(()))
    capture(module.requires_grad_(False), SIZE)
    assert float(module.get_buffer("calls")) == 1  # it is called once, to compare


def reduced(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_reduced_precision_is_refused() -> None:
    module = Broken(reduced)
    module.fc = nn.Linear(3, 2)
    text = message(lambda: capture(module.requires_grad_(False), SIZE))
    assert "torch.bfloat16" in text and "enabled=False" in text
