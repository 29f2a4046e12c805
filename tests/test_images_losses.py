"""Losses of images against sums by hand, torch's own reductions and numerical derivatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsq.images.forward import ForwardPass, NormInput
from zsq.images.losses import (
    BatchNormStatistics,
    InputStatistics,
    bn_statistics_distance,
    channel_statistics,
    joined_statistics,
)


def features(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=rng, dtype=torch.float64).mul(2).add(1).to(dtype)


def as_forward(images: Tensor, *norms: NormInput) -> ForwardPass:
    return ForwardPass(images=images, norms=norms, logits=None)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.lists(st.integers(1, 4), max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_statistics_are_those_of_torch(n: int, c: int, positions: list[int], last: bool, half: bool) -> None:
    x = features(n + 1, c, *positions, dtype=torch.bfloat16 if half else torch.float32)
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    mean, std = channel_statistics(x)
    axes = [a for a in range(x.ndim) if a != 1]
    assert mean.dtype == std.dtype == torch.float32
    # float32 sums of at most 384 values of size 10; also for bfloat16, which is exact in float32
    torch.testing.assert_close(mean, x.float().mean(axes), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std, x.float().std(axes, correction=1), rtol=1e-4, atol=1e-4)


def test_statistics_survive_a_mean_far_from_zero() -> None:
    x = features(64, 2, 8, 8).float()
    _, std = channel_statistics(x + 1000)
    torch.testing.assert_close(std, x.std((0, 2, 3)), rtol=1e-4, atol=0)  # 1000 has 6e-5 between floats


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (2, 3, 2, 3), (1, 2, 3, 1)])
def test_gradients_of_statistics(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(channel_statistics, features(*shape).requires_grad_())


def test_statistics_of_several_layers_are_those_of_each() -> None:
    layers = [features(4, 3, 5, 5).requires_grad_(), features(6, 2).requires_grad_()]
    mean, std = joined_statistics(layers)
    each = [channel_statistics(x) for x in layers]
    assert torch.equal(mean, torch.cat([m for m, _ in each]))
    assert torch.equal(std, torch.cat([s for _, s in each]))
    weights = features(2, 5)
    joint = torch.autograd.grad((mean * weights[0] + std * weights[1]).sum(), layers)
    parts = [w.split([3, 2]) for w in weights]
    alone = sum(((m * u).sum() + (s * v).sum() for (m, s), u, v in zip(each, *parts, strict=True)), start=0)
    for a, b in zip(joint, torch.autograd.grad(alone, layers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_torch_in_both_layouts(dtype: torch.dtype) -> None:
    x = features(4, 3, 5, 5, dtype=dtype)
    weights = features(2, 3).float()
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.contiguous(memory_format=layout).detach().requires_grad_()
        mean, std = channel_statistics(leaf)
        (grad,) = torch.autograd.grad((mean * weights[0] + std * weights[1]).sum(), leaf)
        assert grad.dtype == dtype and grad.is_contiguous(memory_format=layout)
        grads.append(grad.float())
    leaf = x.float().requires_grad_()
    loss = (leaf.mean((0, 2, 3)) * weights[0] + leaf.std((0, 2, 3)) * weights[1]).sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8  # the gradient is rounded to bfloat16 once
    for grad in grads:
        torch.testing.assert_close(grad, expected, rtol=tolerance, atol=1e-7)


def test_constant_channel_has_a_finite_gradient() -> None:
    x = torch.stack((torch.full((4, 3), 2.0), features(4, 3).float()), 1).requires_grad_()
    loss = bn_statistics_distance(x, torch.zeros(2), torch.ones(2))
    (grad,) = torch.autograd.grad(loss, x)
    # channel 0: d/dx of (mu - 0)^2 / 2 is 2 * mu / (n * 2) = 2 / 12; its deviation contributes nothing
    torch.testing.assert_close(grad[:, 0], torch.full((4, 3), 2 / 12))
    assert grad.isfinite().all()


def test_distance_by_hand() -> None:
    # channel 0: 1, 2, 3, 6: mean 3, unbiased variance (4 + 1 + 0 + 9) / 3
    # channel 1: 0, 0, 0, 4: mean 1, unbiased variance (1 + 1 + 1 + 9) / 3
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [6.0, 4.0]], dtype=torch.float64)
    mean, var = torch.tensor([1.0, 1.5]).double(), torch.tensor([4.0, 0.0]).double()
    first = (3 - 1) ** 2 + (math.sqrt(14 / 3) - math.sqrt(4 + 1e-6)) ** 2
    second = (1 - 1.5) ** 2 + (2 - math.sqrt(1e-6)) ** 2
    expected = torch.tensor((first + second) / 2, dtype=torch.float64)
    torch.testing.assert_close(bn_statistics_distance(x, mean, var), expected)
    images = x.view(2, 2, 2).mT.contiguous()  # (N, C, L) with the same values in each channel
    torch.testing.assert_close(bn_statistics_distance(images, mean, var), expected)


def test_distance_is_zero_when_statistics_coincide() -> None:
    x = features(16, 4, 3, 3)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
    assert bn_statistics_distance(x, mean, var, eps=0.0) < 1e-28
    assert bn_statistics_distance(x, mean, var) < 1e-12  # the published eps of 1e-6 stands on one side only


def test_sum_over_layers_and_gradcheck() -> None:
    a, b = features(3, 2, 2, 2).requires_grad_(), features(4, 3).requires_grad_()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        norms = (
            NormInput("a", a, torch.zeros(2).double(), torch.ones(2).double(), 1e-5),
            NormInput("b", b, torch.ones(3).double(), torch.full((3,), 2.0).double(), 1e-5),
        )
        return BatchNormStatistics()(as_forward(a, *norms))

    apart = bn_statistics_distance(a, torch.zeros(2), torch.ones(2)) + bn_statistics_distance(
        b, torch.ones(3), torch.full((3,), 2.0)
    )
    torch.testing.assert_close(loss(a, b), apart)
    assert torch.autograd.gradcheck(loss, (a, b))


@pytest.mark.parametrize("channels", [1, 3])
def test_input_statistics(channels: int) -> None:
    images = features(4, channels, 3, 5)
    mean, std = images.mean((2, 3)), images.std((2, 3), correction=1)
    expected = ((mean**2).sum() + ((std - 1) ** 2).sum()) / 4
    for layout in (torch.contiguous_format, torch.channels_last):
        got = InputStatistics()(as_forward(images.contiguous(memory_format=layout)))
        torch.testing.assert_close(got, expected)
    images.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: InputStatistics()(as_forward(x)), images)


def test_wrong_shapes_are_said() -> None:
    with pytest.raises(ValueError, match=r"must be \(3,\), got \(2,\)"):
        bn_statistics_distance(features(4, 3), torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match="at least 2 values"):
        channel_statistics(features(1, 3, 1, 1))
