"""What image losses see of the teacher: the inputs of BatchNorm layers wherever these stand."""

import pytest
import torch
import torch.nn.functional as F
from image_networks import SIZE, AfterReLU, NoBatchNorm, PreActivation, Residual, captured, photographs
from torch import Tensor, fx, nn

from zsq.errors import UsageError
from zsq.graph.capture import capture
from zsq.images.forward import frozen_batch_norm, observe

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
