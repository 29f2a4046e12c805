"""The picture of synthetic images: pixels, colours, sizes."""

import numpy as np
import pytest
import torch

from zsq.images.contact_sheet import GAP, contact_sheet
from zsq.teacher import ModelSpec


def spec(channels: int, size: int) -> ModelSpec:
    return ModelSpec(
        input_size=(channels, size, size),
        mean=(0.5, 0.4, 0.3, 0.2)[:channels],
        std=(0.25, 0.2, 0.1, 0.1)[:channels],
        crop_fraction=1.0,
    )


def test_pixels_are_denormalised_and_cut() -> None:
    images = torch.zeros(3, 3, 100, 100)
    images[1] = 10.0
    images[2] = -10.0
    picture = np.asarray(contact_sheet(images, spec(3, 100)))
    assert picture.shape == (2 * 100 + 3 * GAP, 2 * 100 + 3 * GAP, 3)
    near, far = GAP, 2 * GAP + 100
    assert picture[near, near].tolist() == [128, 102, 76]  # 0.5, 0.4, 0.3 of 255; the half rounds to even
    assert picture[near, far].tolist() == [255, 255, 255]
    assert picture[far, near].tolist() == [0, 0, 0]
    assert picture[far, far].tolist() == [255, 255, 255]  # an empty place
    assert picture[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_small_images_are_enlarged(channels: int) -> None:
    images = torch.randn(5, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    picture = contact_sheet(images, spec(channels, 8))
    assert picture.mode == ("RGB" if channels == 3 else "L")
    assert picture.size == (3 * 64 + 4 * GAP, 2 * 64 + 3 * GAP)
    corner = np.asarray(picture)[GAP : GAP + 8, GAP : GAP + 8]
    assert (corner == corner[0, 0]).all()


def test_limit_and_errors() -> None:
    images = torch.randn(150, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert contact_sheet(images, spec(1, 64)).size == (10 * 64 + 11 * GAP,) * 2
    assert contact_sheet(images, spec(1, 64), limit=1).size == (64 + 2 * GAP,) * 2
    with pytest.raises(ValueError, match="expected"):
        contact_sheet(images, spec(3, 64))
    with pytest.raises(ValueError, match="expected"):
        contact_sheet(images[:0], spec(1, 64))
