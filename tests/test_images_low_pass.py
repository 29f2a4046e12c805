"""The low-pass filter: exact gains, means kept, nothing imaginary, strength by size and in bins."""

import math

import pytest
import torch
from torch import Tensor

from zsq.errors import UsageError
from zsq.images.low_pass import low_pass, low_pass_gain
from zsq.images.settings import LowPass


def filtered(images: Tensor, cutoff: float, unit: str = "bins") -> Tensor:
    settings = LowPass(cutoff=cutoff, unit=unit)  # type: ignore[arg-type]
    return low_pass(images, low_pass_gain(settings, *images.shape[-2:]))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (8, 5), (5, 12)])
def test_every_frequency_has_its_gain_and_keeps_its_phase(height: int, width: int) -> None:
    """A single frequency comes out as itself times exp(-(v^2 + u^2) / (2 D0^2))."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cutoff = 2.5
    for v in range(height):
        for u in range(width):
            wave = torch.cos(2 * math.pi * (v * y / height + u * x / width) + 0.7)
            # Frequencies beyond the middle are negative ones.
            fold = min(v, height - v) ** 2 + min(u, width - u) ** 2
            expected = wave * math.exp(-fold / (2 * cutoff**2))
            found = filtered(wave[None, None], cutoff)[0, 0]
            assert torch.allclose(found, expected, atol=1e-5), (v, u)


# Size, bins, gain at a quarter and at half of the size, in the corner, energy kept of white noise
TABLE = [
    (224, 20, 0.020, 2e-7, 0.0, 0.025),
    (224, 40, 0.375, 0.020, 4e-4, 0.100),
    (224, 60, 0.647, 0.175, 0.031, 0.222),
    (224, 80, 0.783, 0.375, 0.141, 0.363),
    (224, 100, 0.855, 0.534, 0.285, 0.492),
    (32, 8, 0.607, 0.135, 0.018, 0.195),
    (32, 20, 0.923, 0.726, 0.53, 0.676),
    (32, 100, 0.997, 0.987, 0.97, 0.983),
]


@pytest.mark.parametrize(("size", "bins", "quarter", "half", "corner", "energy"), TABLE)
def test_table_of_gains(
    size: int, bins: float, quarter: float, half: float, corner: float, energy: float
) -> None:
    gain = low_pass_gain(LowPass(cutoff=bins, unit="bins"), size, size)
    assert gain[0, 0] == 1.0  # exactly: means stay
    assert gain[0, size // 4] == pytest.approx(quarter, abs=6e-4)
    assert gain[0, size // 2] == pytest.approx(half, abs=6e-4)
    assert gain[size // 2, 0] == gain[0, size // 2]
    assert gain[size // 2, size // 2] == pytest.approx(corner, abs=6e-3)
    images = noise(2 if size > 100 else 60, 3, size, size)
    kept = filtered(images, bins).square().sum() / images.square().sum()
    assert float(kept) == pytest.approx(energy, rel=0.02)


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (6, 11)])
def test_means_stay_and_a_wide_filter_changes_nothing(size: tuple[int, int]) -> None:
    images = noise(4, 3, *size) + 5
    for cutoff in (0.3, 2.0, 1e6):
        found = filtered(images, cutoff)
        assert found.dtype == torch.float32 and found.shape == images.shape
        assert torch.allclose(found.mean((2, 3)), images.mean((2, 3)), atol=1e-5)
    assert torch.allclose(filtered(images, 1e6), images, atol=1e-5)
    assert torch.allclose(filtered(images, 1e-3), images.mean((2, 3), keepdim=True), atol=1e-5)


def test_linear_by_channel_commutes_with_shifts_and_grows_with_the_cutoff() -> None:
    a, b = noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1)
    assert torch.allclose(filtered(2 * a - b, 2.0), 2 * filtered(a, 2.0) - filtered(b, 2.0), atol=1e-5)
    rolled = filtered(a.roll((2, 3), (2, 3)), 2.0)
    assert torch.allclose(rolled, filtered(a, 2.0).roll((2, 3), (2, 3)), atol=1e-5)
    assert torch.allclose(filtered(a, 2.0)[:, 1:2], filtered(a[:, 1:2], 2.0), atol=1e-6)
    energies = [float(filtered(a, cutoff).square().sum()) for cutoff in (0.5, 1.0, 2.0, 4.0, 8.0)]
    assert energies == sorted(energies) and energies[0] < energies[-1]


def test_by_size_the_blur_is_the_same_at_any_size() -> None:
    """A quarter of the size: 8 bins of 32 pixels, 56 of 224; and both axes blur alike."""
    for size in (32, 224):
        by_size = low_pass_gain(LowPass(cutoff=0.25), size, size)
        assert torch.allclose(
            by_size, low_pass_gain(LowPass(cutoff=size / 4, unit="bins"), size, size), atol=1e-6
        )
        assert by_size[0, size // 4] == pytest.approx(math.exp(-0.5))
    wide = low_pass_gain(LowPass(cutoff=0.25), 16, 32)
    assert wide[4, 0] == pytest.approx(float(wide[0, 8]))  # a quarter period a pixel, down and across


def test_wrong_settings_and_sizes() -> None:
    with pytest.raises(UsageError, match="low_pass.cutoff is 0"):
        LowPass(cutoff=0)
    with pytest.raises(UsageError, match="low_pass.unit"):
        LowPass(unit="pixels")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the gain must be"):
        low_pass(noise(1, 1, 8, 8), low_pass_gain(LowPass(), 8, 10))
