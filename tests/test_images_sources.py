"""The generator: sizes, scale, initialisation, and its cheap convolution against the plain form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zsq.images.sources import LatentGenerator, upsample_conv


def generator(size: tuple[int, int, int], seed: int = 0, latent_size: int = 16) -> LatentGenerator:
    return LatentGenerator(size, latent_size=latent_size, rng=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (3, 5, 2, 7)])
@pytest.mark.parametrize("outputs", [1, 3, 6])
def test_cheap_convolution_equals_the_plain_one(shape: tuple[int, ...], outputs: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()
    weight = torch.randn(outputs, shape[1], 3, 3, generator=rng, dtype=torch.float64).requires_grad_()
    bias = torch.randn(outputs, generator=rng, dtype=torch.float64).requires_grad_()
    cheap = upsample_conv(x, weight, bias)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    torch.testing.assert_close(cheap, plain, rtol=1e-12, atol=1e-12)  # the order of summation differs
    direction = torch.randn(plain.shape, generator=rng, dtype=torch.float64)
    leaves = (x, weight, bias)
    for got, expected in zip(
        torch.autograd.grad(cheap, leaves, direction),
        torch.autograd.grad(plain, leaves, direction),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(upsample_conv, leaves, fast_mode=True)


def test_whole_network_equals_the_plain_modules() -> None:
    ours = generator((3, 8, 12))
    latents = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    norm1, norm2, norm3 = nn.BatchNorm2d(128), nn.BatchNorm2d(64), nn.BatchNorm2d(3, affine=False)
    x = F.linear(latents, ours.linear_weight, ours.linear_bias).view(6, 128, 2, 3)
    x = F.interpolate(norm1(x), scale_factor=2)
    x = F.leaky_relu(norm2(F.conv2d(x, ours.conv1_weight, ours.conv1_bias, padding=1)), 0.2)
    x = F.conv2d(F.interpolate(x, scale_factor=2), ours.conv2_weight, ours.conv2_bias, padding=1)
    torch.testing.assert_close(ours(latents), norm3(x.tanh()), rtol=1e-4, atol=1e-4)  # float32 through 3 BN


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 28, 28), (3, 9, 14), (4, 5, 3), (2, 1, 6)])
def test_sizes_and_scale(size: tuple[int, int, int]) -> None:
    images = generator(size)(torch.randn(20, 16, generator=torch.Generator().manual_seed(1)))
    assert images.shape == (20, *size) and images.dtype == torch.float32
    assert images.mean((0, 2, 3)).abs().max() < 1e-4
    assert (images.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-3  # eps 1e-5 of the last BatchNorm


def test_images_are_float32_under_autocast() -> None:
    latents = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    network = generator((3, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        images = network(latents)
    assert images.dtype == torch.float32
    assert images.mean((0, 2, 3)).abs().max() < 1e-4
    assert F.mse_loss(images, network(latents)) < 0.01  # variance 1; bfloat16 has 8 bits


def test_parameters_come_from_the_rng_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = generator((3, 8, 8), 0), generator((3, 8, 8), 0), generator((3, 8, 8), 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c)


def test_initial_distribution_is_that_of_the_torch_layers() -> None:
    ours = generator((3, 16, 16), latent_size=100)
    linear, conv1, conv2 = nn.Linear(100, 2048), nn.Conv2d(128, 64, 3), nn.Conv2d(64, 3, 3)
    pairs = [
        (ours.linear_weight, linear.weight),
        (ours.linear_bias, linear.bias),
        (ours.conv1_weight, conv1.weight),
        (ours.conv2_weight, conv2.weight),
    ]
    for got, expected in ((a.detach(), b.detach()) for a, b in pairs):
        assert got.shape == expected.shape
        assert got.abs().max() == pytest.approx(float(expected.abs().max()), rel=0.01)  # the bound
        assert got.std() == pytest.approx(float(expected.std()), rel=0.05)
    assert ours.conv1_bias.shape == (64,) and ours.conv1_bias.abs().max() <= (9 * 128) ** -0.5
    assert ours.conv2_bias.shape == (3,) and ours.conv2_bias.abs().max() <= (9 * 64) ** -0.5
