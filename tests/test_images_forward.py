"""What image losses see of the teacher: the inputs of BatchNorm layers wherever these stand."""

import pytest
import torch
import torch.nn.functional as F
from image_networks import (
    SIZE,
    AfterReLU,
    NoBatchNorm,
    PreActivation,
    Residual,
    captured,
    photographs,
    trained,
)
from torch import Tensor, fx, nn

from zsq.errors import UsageError
from zsq.graph.capture import capture
from zsq.graph.frozen import frozen_batch_norm, frozen_depthwise
from zsq.images.forward import observe
from zsq.images.losses import BatchNormStatistics

KINDS = {
    Residual: ["bn1", "bn2", "bn3"],
    PreActivation: ["bn0", "bn1", "bn2"],
    AfterReLU: ["bn1", "bn2"],
}


@pytest.fixture(scope="module", params=list(KINDS), ids=lambda kind: kind.__name__)
def network(request: pytest.FixtureRequest) -> tuple[type[nn.Module], fx.GraphModule]:
    return request.param, captured(request.param)


def test_features_are_the_inputs_of_the_layers(network: tuple[type[nn.Module], fx.GraphModule]) -> None:
    kind, graph_module = network
    images = photographs(4, SIZE)
    forward = observe(graph_module, logits=True)(images)
    assert [n.name for n in forward.norms] == KINDS[kind]
    plain = kind()
    plain.load_state_dict(
        {k: v for k, v in graph_module.state_dict().items() if "constant" not in k}, strict=False
    )
    seen: dict[str, Tensor] = {}
    for name in KINDS[kind]:
        plain.get_submodule(name).register_forward_hook(
            lambda _, inputs, __, name=name: seen.update({name: inputs[0].clone()})
        )
    output = plain.eval()(images)
    assert forward.images is images and forward.logits is not None
    torch.testing.assert_close(forward.logits, output[0] if isinstance(output, tuple) else output)
    for norm in forward.norms:
        layer = plain.get_submodule(norm.name)
        assert isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
        torch.testing.assert_close(norm.features, seen[norm.name])
        assert torch.equal(norm.mean, layer.running_mean) and torch.equal(norm.var, layer.running_var)
        assert norm.eps == layer.eps


def test_stops_before_the_last_batch_norm() -> None:
    graph_module = captured(Residual)
    before = graph_module.code
    observer = observe(graph_module)
    assert observer(photographs(2, SIZE)).logits is None
    targets = [node.target for node in observer._graph_module.graph.nodes]
    assert targets.count(frozen_batch_norm) == 1  # bn1; bn2 and bn3 are only looked at
    assert torch.ops.aten.linear.default not in targets
    assert graph_module.code == before


def test_without_stored_statistics() -> None:
    network = capture(NoBatchNorm().eval(), SIZE)
    with pytest.raises(UsageError, match="--images"):
        observe(network)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_frozen_batch_norm_is_that_of_torch(shape: tuple[int, ...], affine: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()
    weight, bias, mean, var = torch.rand(4, 3, generator=rng, dtype=torch.float64)
    pair = (weight, bias) if affine else (None, None)
    ours = frozen_batch_norm(x, *pair, mean, var, 1e-3)
    expected = F.batch_norm(x, mean, var, *pair, eps=1e-3)
    torch.testing.assert_close(ours, expected)
    direction = torch.randn(shape, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, direction), torch.autograd.grad(expected, x, direction)
    )
    assert torch.autograd.gradcheck(lambda x: frozen_batch_norm(x, *pair, mean, var, 1e-3), x)


def test_bfloat16_features_keep_float32_statistics() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        forward = observe(captured(Residual))(photographs(2, SIZE))
    assert {n.features.dtype for n in forward.norms} == {torch.bfloat16}
    assert {n.mean.dtype for n in forward.norms} == {torch.float32}


def synthesis_loss(graph_module: fx.GraphModule, images: Tensor, *, fold: bool) -> tuple[Tensor, Tensor]:
    """BatchNorm loss and its gradient."""
    images = images.clone().requires_grad_()
    loss = BatchNormStatistics()(observe(graph_module, fold=fold)(images))
    return loss.detach(), torch.autograd.grad(loss, images)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_folding_changes_nothing(network: tuple[type[nn.Module], fx.GraphModule], dtype: torch.dtype) -> None:
    kind, _ = network
    graph_module = captured(kind).to(dtype)
    for name, value in graph_module.named_parameters():
        if name == "bn1.weight":
            value[0] *= -1
    code, state = graph_module.code, {k: v.clone() for k, v in graph_module.state_dict().items()}
    images = photographs(6, SIZE).to(dtype)
    plain, folded = (synthesis_loss(graph_module, images, fold=fold) for fold in (False, True))
    tight = {"rtol": 1e-10, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(folded[0], plain[0], **tight)
    torch.testing.assert_close(folded[1], plain[1], **tight)
    logits = [observe(graph_module, logits=True, fold=fold)(images).logits for fold in (False, True)]
    torch.testing.assert_close(logits[0], logits[1], **tight)
    assert graph_module.code == code
    assert all(torch.equal(value, state[name]) for name, value in graph_module.state_dict().items())


def frozen_layers(graph_module: fx.GraphModule, *, logits: bool) -> list[str]:
    """Names of the layers that stay BatchNorms in an observer that folds."""
    forward = observe(graph_module, logits=logits, fold=True)(photographs(2, SIZE))
    return [norm.name for norm in forward.norms if norm.scale is None]


def test_what_is_folded() -> None:
    assert frozen_layers(captured(Residual), logits=True) == []
    assert frozen_layers(captured(Residual), logits=False) == ["bn2", "bn3"]  # only looked at
    assert frozen_layers(captured(PreActivation), logits=True) == [
        "bn0",
        "bn1",
    ]  # bn2 follows the linear layer
    assert frozen_layers(captured(AfterReLU), logits=True) == ["bn1", "bn2"]
    graph = observe(captured(Residual), logits=True, fold=True)._graph_module.graph
    assert not any(node.target is frozen_batch_norm for node in graph.nodes)


@pytest.mark.parametrize("factor", [0.0, 1e-6])
def test_a_channel_that_is_switched_off_keeps_its_layer(factor: float) -> None:
    graph_module = captured(Residual)
    dict(graph_module.named_parameters())["bn1.weight"][3] *= factor
    assert frozen_layers(graph_module, logits=True) == ["bn1"]
    images = photographs(6, SIZE)
    plain, folded = (synthesis_loss(graph_module, images, fold=fold) for fold in (False, True))
    torch.testing.assert_close(folded, plain)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_strided_depthwise_is_that_of_torch(groups: int, precision: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(2, 4, 7, 9, generator=rng)
    weight, bias = torch.randn(8, 4 // groups, 3, 3, generator=rng), torch.randn(8, generator=rng)
    direction = torch.randn(2, 8, 4, 5, generator=rng)
    gradients = []
    for convolution in (frozen_depthwise, torch.conv2d):
        x = images.to(precision).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            y = convolution(x, weight, bias, [2, 2], [1, 1], [1, 1], groups)
        (gradient,) = torch.autograd.grad(y, x, direction.to(y.dtype))
        assert y.dtype == gradient.dtype == precision
        gradients.append(gradient)
    tolerance = 5e-2 if precision is torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradients[0], gradients[1], rtol=tolerance, atol=tolerance)


class Depthwise(nn.Module):
    """A depthwise convolution with stride 2 between others, each with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.depthwise(F.relu6(self.bn1(self.conv(x))))).mean((2, 3))


def test_observers_take_the_cheaper_depthwise_gradient() -> None:
    network = trained(Depthwise())
    graph_module = capture(network, SIZE)
    targets = [node.target for node in observe(graph_module, fold=True)._graph_module.graph.nodes]
    assert targets.count(frozen_depthwise) == 1
    images = photographs(4, SIZE).requires_grad_()
    norms = observe(graph_module, fold=True)(images).norms
    plain = network.depthwise(F.relu6(network.bn1(network.conv(images))))
    torch.testing.assert_close(norms[1].features, plain)
    direction = torch.ones_like(plain)
    torch.testing.assert_close(
        torch.autograd.grad(norms[1].features, images, direction),
        torch.autograd.grad(plain, images, direction),
    )
