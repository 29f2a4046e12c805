"""Moments without images: closed forms against Monte Carlo, propagation against measured activations."""

import math

import pytest
import torch
from statistics_networks import SIZE, Separable, Shortcut, fitted, images, values_at
from test_equalize import folded
from torch import Tensor, nn

from zsq.errors import UsageError
from zsq.graph.capture import capture
from zsq.graph.channels import channel_sums
from zsq.graph.moments import batch_norm_outputs, moments, needed
from zsq.graph.nodes import weight_node
from zsq.graph.normal import clipped_normal
from zsq.quant.attach import attach
from zsq.quant.scheme import parse_bits
from zsq.quant.statistical_ranges import set_ranges
from zsq.recover.correct_bias import correct_biases

STANDARD = torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 0.5)])
def test_clipped_normal_is_what_samples_give(limits: tuple[float, float]) -> None:
    mean = torch.tensor([-3.0, -0.5, 0.0, 0.7, 2.0, 6.5])
    std = torch.tensor([1.0, 0.5, 2.0, 1.5, 0.0, 1.0])
    z = torch.randn(400_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (mean + std * z).clamp(*limits)
    found = clipped_normal(mean, std, *limits)
    torch.testing.assert_close(found[0].double(), x.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(found[1].double(), x.std(0), rtol=0, atol=0.01)


def test_relu_of_the_standard_normal() -> None:
    mean, std = clipped_normal(torch.zeros(1), torch.ones(1), 0.0)
    # E = 1 / sqrt(2 pi), E of the square = 1/2
    assert float(mean) == pytest.approx(1 / math.sqrt(2 * math.pi))
    assert float(std) == pytest.approx(math.sqrt(0.5 - 1 / (2 * math.pi)))
    unclipped = clipped_normal(torch.tensor([1.5]), torch.tensor([0.3]))
    assert [float(v) for v in unclipped] == pytest.approx([1.5, 0.3])


@pytest.mark.parametrize("kind", [Separable, Shortcut])
@pytest.mark.parametrize("fold", [False, True])
def test_means_are_near_the_measured_ones(kind: type[nn.Module], fold: bool) -> None:
    module, known = folded(kind, spread=0.3) if fold else (fitted(kind, spread=0.3), {})
    found = moments(module, known, STANDARD, deviations=6.0)
    layers = [n for n in module.graph.nodes if weight_node(n) is not None]
    names = [str(n.args[0]) for n in layers if n.args[0].op != "placeholder"]
    assert set(names) <= set(found)
    for name, values in values_at(module, names, images(512, seed=7)).items():
        gap = (found[name].mean - values.mean(1)) / values.std(1).mean()
        if name == "max_pool2d":
            assert float(gap.max()) < 0.1 and float(gap.mean()) < -0.5  # as documented
        else:
            assert float(gap.abs().mean()) < 0.15, name


@pytest.mark.parametrize("kind", [Separable, Shortcut])
def test_ranges_hold_nearly_everything(kind: type[nn.Module]) -> None:
    module, known = folded(kind)
    found = moments(module, known, STANDARD, deviations=6.0)
    student, quantizers = attach(module, parse_bits("W8A8", ends="same"))
    set_ranges(student, quantizers, found)
    by_name = {n.name: n for n in module.graph.nodes}
    outputs = values_at(module, quantizers.activations, images(64, seed=9))
    assert outputs.keys() == quantizers.activations.keys()
    for tensor, name in quantizers.activations.items():
        quantizer = student.get_submodule(name)
        lo = float(-quantizer.zero_point * quantizer.scale)  # type: ignore[operator, arg-type]
        hi = lo + 255 * float(quantizer.scale)  # type: ignore[arg-type]
        inside = (outputs[tensor] >= lo - 1e-3) & (outputs[tensor] <= hi)
        assert float(inside.float().mean()) > 0.9999 and hi < 4 * float(outputs[tensor].max())
        if by_name[tensor].target is torch.ops.aten.relu.default:
            assert lo == 0
    x = images(32, seed=9)
    assert float((student(x) - module(x)).std()) < 0.1 * float(module(x).std())


def test_range_of_one_layer_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.bn(self.conv(x)).relu())

    network = Net().eval()
    network.bn.weight.data, network.bn.bias.data = torch.tensor([2.0, -1.0]), torch.tensor([1.0, -3.0])
    module = capture(network.requires_grad_(False), SIZE)
    student, quantizers = attach(module, parse_bits("W8A8", ends="same"))
    set_ranges(student, quantizers, moments(module, {}, STANDARD, deviations=6.0))
    (name,) = quantizers.activations.values()
    # channels reach 1 + 6 * 2 = 13 and -3 + 6 * 1 = 3; ReLU cuts at 0
    assert float(student.get_submodule(name).scale) == pytest.approx(13 / 255)  # type: ignore[arg-type]
    assert batch_norm_outputs(module)[next(n.name for n in module.graph.nodes if "batch" in n.name)][
        1
    ].tolist() == [
        2.0,
        1.0,
    ]


@pytest.mark.parametrize("kind", [Separable, Shortcut])
def test_bias_correction_is_the_formula_and_removes_the_shift(kind: type[nn.Module]) -> None:
    module, known = folded(kind, spread=0.3)
    student, quantizers = attach(module, parse_bits("W2", ends="same"))
    plain, _ = attach(module, parse_bits("W2", ends="same"))
    found = moments(module, known, STANDARD, deviations=6.0)
    correct_biases(module, student, quantizers, found)
    x = images(512, seed=7)
    layers = [n for n in module.graph.nodes if weight_node(n) is not None and n.args[0].op != "placeholder"]
    assert any(len(n.args) < 3 or n.args[2] is None for n in fitted(kind).graph.nodes if weight_node(n))
    for node in layers:
        rounded = student.get_submodule(quantizers.weights[node.name])()  # type: ignore[operator]
        own = next(n for n in student.graph.nodes if n.name == node.name)
        bias = student.get_parameter(str(own.args[2].target))
        original = module.get_parameter(str(node.args[2].target))
        source = next(n for n in module.graph.nodes if n is node.args[0])
        # the shift by Monte Carlo: the layer's error on random inputs of the claimed mean, nothing padded
        mean = found[source.name].mean
        error = rounded - module.get_parameter(str(node.args[1].target))
        draws = mean + 0.1 * torch.randn(4000, len(mean), generator=torch.Generator().manual_seed(0))
        shift = (draws @ channel_sums(error, node, len(mean)).t()).mean(0)
        torch.testing.assert_close(original - bias, shift, rtol=0.05, atol=0.02)
    shifts = [float((s(x) - module(x)).mean(0).square().mean().sqrt()) for s in (plain, student)]
    assert shifts[1] < 0.7 * shifts[0]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_channel_sums(groups: int) -> None:
    network = nn.Conv2d(4, 8, 3, groups=groups, bias=False)
    wrapped = nn.Sequential(network, nn.Flatten(), nn.Linear(8 * 36, 5)).eval().requires_grad_(False)
    module = capture(wrapped, (4, 8, 8))
    conv, linear = (n for n in module.graph.nodes if weight_node(n) is not None)
    constant = torch.randn(4)
    x = constant.view(1, 4, 1, 1).expand(1, 4, 8, 8)
    torch.testing.assert_close(channel_sums(network.weight, conv, 4) @ constant, network(x)[0, :, 0, 0])
    sums = channel_sums(module.get_parameter("2.weight"), linear, 8)
    torch.testing.assert_close(sums[:, 3], module.get_parameter("2.weight")[:, 3 * 36 : 4 * 36].sum(1))


def test_unknown_tensors_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.LayerNorm(8), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x)))

    module = capture(Net().eval().requires_grad_(False), SIZE)
    found = moments(module, {}, STANDARD, deviations=6.0)
    with pytest.raises(UsageError, match="'layer_norm' cannot be derived.*zeroq"):
        needed(found, "layer_norm")
