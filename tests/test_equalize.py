"""Weight rewrites: the same function, equal ranges, statistics that stay true."""

import pytest
import torch
from statistics_networks import Separable, Shortcut, fitted, images, values_at
from torch import Tensor, fx, nn

from zsq.graph.capture import capture
from zsq.graph.channels import by_input_channel
from zsq.graph.equalize import absorb_bias, equalize, pairs, relu6_to_relu
from zsq.graph.fold import fold_batch_norms
from zsq.graph.moments import batch_norm_outputs
from zsq.graph.nodes import weight_node
from zsq.graph.tensors import get_tensor

Known = dict[str, tuple[Tensor, Tensor]]


def folded(kind: type[nn.Module], **options: float) -> tuple[fx.GraphModule, Known]:
    graph = fitted(kind, **options)
    result, found = fold_batch_norms(graph)
    outputs = batch_norm_outputs(graph)
    return result, {p.layer: outputs[p.batch_norm] for p in found if p.layer is not None}


def weight_names(graph: fx.Graph) -> list[tuple[str, str]]:
    return [
        (str(weight_node(p.first).target), str(weight_node(p.second).target))  # type: ignore[union-attr]
        for p in pairs(graph)
    ]


def test_pairs_are_found() -> None:
    module, _ = folded(Separable)
    chain = ["conv1", "depthwise", "pointwise", "grouped", "hidden", "linear"]
    expected = [(f"{a}.weight", f"{b}.weight") for a, b in zip(chain, chain[1:], strict=False)]
    assert weight_names(module.graph) == expected


def test_clips_sums_and_nonlinear_functions_end_a_pair() -> None:
    module, _ = folded(Shortcut)
    # conv1 has two readers behind its ReLU6, conv2 goes into a sum, conv3 is clipped at 6
    assert pairs(module.graph) == []
    unclipped = relu6_to_relu(module)
    assert weight_names(unclipped.graph) == [("conv3.weight", "linear.weight")]
    assert not torch.equal(unclipped(10 * images(4)), module(10 * images(4)))
    torch.testing.assert_close(unclipped(0.01 * images(4)), module(0.01 * images(4)))


@pytest.mark.parametrize("kind", [Separable, Shortcut])
def test_equalized_networks_compute_the_same(kind: type[nn.Module]) -> None:
    module, known = folded(kind)
    module = relu6_to_relu(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result, normals = equalize(module, known, passes=50)
    x = images(32, seed=3)
    torch.testing.assert_close(result(x), module(x), rtol=1e-4, atol=1e-4)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert list(normals) == list(known)
    changed = [n for n in known if not torch.equal(known[n][0], normals[n][0])]
    assert len(changed) == len([p for p in pairs(module.graph) if p.first.name in known])
    for name, values in values_at(result, changed, images(512, seed=7)).items():
        mean, std = normals[name]
        torch.testing.assert_close(values.mean(1), mean, rtol=0.02, atol=0.02)
        torch.testing.assert_close(values.std(1), std, rtol=0.02, atol=0.02)


def test_ranges_are_equal_afterwards() -> None:
    module, known = folded(Separable, spread=1.5)
    result, _ = equalize(module, known, passes=50)

    def gaps(m: fx.GraphModule) -> list[float]:
        """Largest ratio of the ranges of the same channel in the two layers of each pair."""
        found = []
        for pair in pairs(m.graph):
            nodes = (weight_node(pair.first), weight_node(pair.second))
            first, second = (get_tensor(m, str(n.target)) for n in nodes if n is not None)
            inputs = by_input_channel(second.detach(), pair.second, len(first))
            ranges = first.abs().flatten(1).amax(1) / inputs.abs().amax((1, 3)).flatten()
            found.append(float(ranges.log().abs().max()))
        return found

    assert min(gaps(module)) > 0.3
    assert max(gaps(result)) < 0.01


def test_one_pass_by_hand() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[8.0, -2.0], [0.0, 0.0]]))
        network[0].bias.copy_(torch.tensor([4.0, 1.0]))
        network[2].weight.copy_(torch.tensor([[-2.0, 3.0]]))
    wrapped = nn.Sequential(nn.Flatten(), network)
    module = capture(wrapped.eval(), (2, 1, 1))
    result, _ = equalize(module, {}, passes=1)
    # r1 = 8, r2 = 2: s = 2; both ranges become sqrt(16) = 4. The second channel has range 0 and stays.
    state = result.state_dict()
    assert state["1.0.weight"].tolist() == [[4.0, -1.0], [0.0, 0.0]]
    assert state["1.0.bias"].tolist() == [2.0, 1.0]
    assert state["1.2.weight"].tolist() == [[-4.0, 3.0]]


def test_absorbed_biases_leave_the_function_where_channels_exceed_them() -> None:
    module, known = folded(Separable, spread=0.3, lift=4.0)
    result, normals = absorb_bias(module, known, deviations=3.0)
    x = images(256, seed=3)
    assert float((result(x) - module(x)).std()) < 0.02 * float(module(x).std())
    moved = [name for name in known if not torch.equal(known[name][0], normals[name][0])]
    # conv1 (its reader pads nothing), pointwise and grouped; the depthwise one has a leaky ReLU
    layers = {weight_node(n).target for n in module.graph.nodes if n.name in moved}  # type: ignore[union-attr]
    assert layers == {"conv1.weight", "pointwise.weight", "grouped.weight", "hidden.weight"}
    for name in moved:
        shift = known[name][0] - normals[name][0]
        torch.testing.assert_close(shift, (known[name][0] - 3 * known[name][1]).clamp(min=0))
    same, _ = absorb_bias(module, known, deviations=100.0)
    assert torch.equal(same(x), module(x))


def test_padding_layers_absorb_nothing() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).mean((2, 3))

    module, known = folded(Padded, lift=6.0)
    result, normals = absorb_bias(module, known, deviations=3.0)
    assert all(torch.equal(normals[n][0], known[n][0]) for n in known)
    assert torch.equal(result(images(4)), module(images(4)))
