"""Random crops and flips: what is drawn, what is interpolated, what every process gets."""

import pytest
import torch
from torch import Tensor

from zsq.images.augment import ASPECT, crop_and_flip, interpolation
from zsq.quant.dropping import Rows

NO, YES = torch.zeros(1), torch.ones(1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32)


def test_interpolation_by_hand() -> None:
    # The whole axis: every pixel itself; mirrored: in reverse.
    whole = interpolation(5, torch.zeros(1), torch.ones(1), NO)[0]
    assert torch.equal(whole, torch.eye(5))
    mirrored = interpolation(5, torch.zeros(1), torch.ones(1), YES)[0]
    assert torch.equal(mirrored, torch.eye(5).flip(0))
    # The first half of 4 pixels: centres at -1/4 (edge: 0), 1/4, 3/4, 5/4.
    half = interpolation(4, torch.zeros(1), torch.tensor([0.5]), NO)[0] @ ramp(4)
    assert half.tolist() == [0.0, 0.25, 0.75, 1.25]
    # The last half: 7/4, 9/4, 11/4, 13/4 (edge: 3).
    half = interpolation(4, torch.tensor([0.5]), torch.tensor([0.5]), NO)[0] @ ramp(4)
    assert half.tolist() == [1.75, 2.25, 2.75, 3.0]


def test_matches_torch_on_a_whole_crop() -> None:
    """An integer crop resized: that of torch's bilinear interpolation (edges within the crop excepted)."""
    images = torch.randn(1, 2, 8, 12, generator=rng())
    down = interpolation(8, torch.tensor([0.25]), torch.tensor([0.5]), NO)
    across = interpolation(12, torch.tensor([0.5]), torch.tensor([0.5]), NO)
    found = down[:, None] @ images @ across[:, None].transpose(-1, -2)
    wanted = torch.nn.functional.interpolate(
        images[:, :, 2:6, 6:12], size=(8, 12), mode="bilinear", align_corners=False
    )
    assert torch.allclose(found[:, :, 1:-1, 1:-1], wanted[:, :, 1:-1, 1:-1], atol=1e-5)


def test_rows_are_averages_and_constants_stay() -> None:
    matrices = interpolation(
        7, torch.rand(50, generator=rng()) * 0.3, torch.full((50,), 0.7), torch.zeros(50)
    )
    assert torch.allclose(matrices.sum(2), torch.ones(50, 7)) and bool((matrices >= 0).all())
    constant = torch.full((6, 3, 8, 8), 2.5)
    assert torch.allclose(crop_and_flip(constant, 0.3, rng()), constant)


def test_areas_ratios_flips() -> None:
    """Sides from the slopes of the ramps x and y; area, ratio and share of mirrored images as said."""
    count, size = 3000, 64
    x = ramp(size).expand(count, 1, size, size)
    images = torch.cat([x, x.transpose(2, 3)], 1)
    found = crop_and_flip(images, 0.5, rng(1))
    middle = size // 2
    wide = found[:, 0, 0, middle + 4] - found[:, 0, 0, middle - 4]
    high = (found[:, 1, middle + 4, 0] - found[:, 1, middle - 4, 0]) / 8
    assert float((wide < 0).float().mean()) == pytest.approx(0.5, abs=0.03) and bool((high > 0).all())
    wide = wide.abs() / 8
    assert bool((wide <= 1 + 1e-3).all()) and bool((high <= 1 + 1e-3).all())
    area, ratio = wide * high, wide / high
    assert bool((area > 0.49).all()) and bool((ratio.log().abs() < torch.tensor(ASPECT * 1.01).log()).all())
    # 0.75 if no side were cut to that of the image
    assert 0.70 < float(area.mean()) < 0.75
    assert float(ratio.log().mean()) == pytest.approx(0, abs=0.01)


def test_all_of_it_with_scale_one_is_nearly_the_image() -> None:
    """Area 1 leaves only the aspect ratio, whose longer side is cut; images are flipped or not."""
    images = torch.randn(8, 3, 6, 6, generator=rng())
    found = crop_and_flip(images, 1.0, rng())
    assert found.shape == images.shape and not torch.equal(found, images)


def test_rows_of_a_batch_are_those_of_the_whole() -> None:
    """Every process draws for all images and works on its own."""
    images = torch.randn(10, 3, 8, 8, generator=rng())
    whole = crop_and_flip(images, 0.5, rng(3))
    first, second = (
        crop_and_flip(images[start:stop], 0.5, rng(3), Rows(start, stop, 10))
        for start, stop in ((0, 4), (4, 10))
    )
    assert torch.allclose(torch.cat([first, second]), whole, atol=1e-6)
    assert torch.equal(crop_and_flip(images, 0.5, rng(3)), whole)
    assert not torch.equal(crop_and_flip(images, 0.5, rng(4)), whole)
