"""Energies of Laws' textures: exact for waves, the same for any contrast, far for noise."""

import math

import pytest
import torch
from torch import Tensor

from zsq.images.pixel_settings import Centres
from zsq.images.texture import (
    FALL,
    SHARED,
    VECTORS,
    natural_energies,
    natural_noise,
    texture_distance,
    texture_energies,
    texture_gains,
)


def by_convolution(images: Tensor) -> Tensor:
    """The nine energies by filtering the mirrored images, which repeat."""
    tall = torch.cat((images, images.flip(2)), 2)
    whole = torch.cat((tall, tall.flip(3)), 3)
    found = []
    for a in range(4):
        for b in range(a, 4):
            if (a, b) == (0, 0):
                continue
            energies = []
            for down, across in ((a, b), (b, a)):
                kernel = torch.outer(torch.tensor(VECTORS[down]), torch.tensor(VECTORS[across]))
                padded = torch.nn.functional.pad(whole, (2, 2, 2, 2), mode="circular")
                n, c, h, w = padded.shape
                answer = torch.nn.functional.conv2d(padded.view(n * c, 1, h, w), kernel[None, None])
                energies.append(answer.square().mean((1, 2, 3)).view(n, c).mean(1))
            found.append(sum(energies) / 2)
    return torch.stack(found, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 3)])
def test_energies_are_those_of_the_filters(size: tuple[int, int]) -> None:
    images = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0))
    expected = by_convolution(images)
    # The level of a filter that has one passes frequency 0 nowhere: every pair has a vector that sums to 0.
    assert torch.allclose(texture_energies(images, texture_gains(*size)), expected, rtol=1e-3, atol=1e-4)


def test_distance_of_the_form_itself_contrast_and_noise() -> None:
    gains = texture_gains(16, 12)
    natural = natural_energies(16, 12, gains)
    assert float(texture_distance(natural[None], natural)) == pytest.approx(0.0, abs=1e-10)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 3, 16, 12, generator=rng)
    energies = texture_energies(noise, gains)
    distance = float(texture_distance(energies, natural))
    assert distance > 1.0
    assert float(texture_distance(9 * energies, natural)) == pytest.approx(distance, rel=1e-4)
    assert float(texture_distance(texture_energies(noise + 5, gains), natural)) == pytest.approx(
        distance, rel=1e-3
    )
    by_hand = math.log(4) / 2  # two energies, one four times the other, against equal ones
    two = torch.tensor([[4.0, 1.0]])
    assert float(texture_distance(two, torch.ones(2))) == pytest.approx(by_hand**2)


@pytest.mark.parametrize("size", [(16, 12), (1, 1), (5, 40)])
def test_natural_noise(size: tuple[int, int]) -> None:
    """Of deviation 1, and of the textures that photographs have but for its borders, which wrap."""
    noise = natural_noise((400, 2, *size), torch.Generator().manual_seed(0))
    assert noise.shape == (400, 2, *size) and noise.dtype == torch.float32
    assert float(noise.square().mean()) == pytest.approx(1.0, rel=0.15)
    if min(size) > 1:
        gains = texture_gains(*size)
        natural = natural_energies(*size, gains)
        white = torch.randn(noise.shape, generator=torch.Generator().manual_seed(0))
        own, other = (
            float(texture_distance(texture_energies(x, gains).mean(0, keepdim=True), natural))
            for x in (noise, white)
        )
        assert own < 0.1 * other


@pytest.mark.parametrize("channels, together", [(1, 1.0), (2, 0.0), (3, SHARED), (4, 0.0)])
def test_colours_of_natural_noise_go_together(channels: int, together: float) -> None:
    noise = natural_noise((2000, channels, 8, 6), torch.Generator().manual_seed(0))
    found = torch.corrcoef(noise.transpose(0, 1).flatten(1).reshape(channels, -1)).reshape(channels, channels)
    torch.testing.assert_close(found, torch.full_like(found, together).fill_diagonal_(1), atol=0.05, rtol=0)


def test_an_image_can_be_moved_there() -> None:
    """By its own gradient, from noise; power then falls about as it should."""
    gains = texture_gains(8, 8)
    natural = natural_energies(8, 8, gains)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.1)
    for _ in range(60):
        loss = texture_distance(texture_energies(images, gains), natural)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    assert bool(texture_energies(torch.zeros(1, 1, 8, 8), gains).isfinite().all()) and FALL == 3.0


def test_settings() -> None:
    from tiny_networks import message

    assert "synthesis.centres.texture_weight" in message(lambda: Centres(texture_weight=-1.0))
