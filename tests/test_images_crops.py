"""Crops as products of matrices, against torch's interpolation."""

import pytest
import torch
import torch.nn.functional as F

from zsq.images.crops import crop, draw_crops


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_whole_image_is_the_identity_and_mirrors() -> None:
    images = torch.randn(2, 3, 8, 6, generator=rng())
    boxes = torch.tensor([[0.0, 0, 8, 6, 0], [0, 0, 8, 6, 1]])
    result = crop(images, boxes)
    torch.testing.assert_close(result[0], images[0])
    torch.testing.assert_close(result[1], images[1].flip(2))


@pytest.mark.parametrize("box", [(1, 2, 5, 4), (0, 3, 8, 3), (4, 0, 3, 6)])
def test_whole_pixels_are_interpolate(box: tuple[int, int, int, int]) -> None:
    images = torch.randn(2, 3, 8, 6, generator=rng())
    top, left, height, width = box
    boxes = torch.tensor([[*box, 0.0], [*box, 1.0]])
    piece = images[:, :, top : top + height, left : left + width]
    expected = F.interpolate(piece, (8, 6), mode="bilinear", align_corners=False)
    result = crop(images, boxes)
    torch.testing.assert_close(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1].flip(2))


def test_drawn_boxes() -> None:
    boxes = draw_crops(5000, (32, 24), 0.4, rng())
    top, left, height, width, mirror = boxes.unbind(1)
    share = height * width / (32 * 24)
    assert float(share.min()) >= 0.4 - 1e-5 and float(share.max()) <= 1 + 1e-5
    assert float(top.min()) >= 0 and float((top + height).max()) <= 32 + 1e-4
    assert float(left.min()) >= 0 and float((left + width).max()) <= 24 + 1e-4
    ratio = width / height
    inside = (ratio >= 3 / 4 - 1e-4) & (ratio <= 4 / 3 + 1e-4)
    whole = share > 1 - 1e-6
    assert bool((inside | whole).all())
    assert float(mirror.mean()) == pytest.approx(0.5, abs=0.03) and set(mirror.tolist()) == {0.0, 1.0}
    assert float(boxes[:, 0].std()) > 1
    assert torch.equal(boxes, draw_crops(5000, (32, 24), 0.4, rng()))


@pytest.mark.parametrize("size", [(32, 32), (5, 7), (1, 4)])
def test_crops_keep_the_shape_and_have_gradients(size: tuple[int, int]) -> None:
    images = torch.randn(4, 2, *size, generator=rng(), dtype=torch.float64).requires_grad_()
    boxes = draw_crops(4, size, 0.3, rng()).double()
    result = crop(images, boxes)
    assert result.shape == images.shape
    low, high = (getattr(images.detach().flatten(1), name)(1).values for name in ("min", "max"))
    flat = result.detach().flatten(1)
    assert bool((flat.min(1).values >= low - 1e-9).all() and (flat.max(1).values <= high + 1e-9).all())
    (slope,) = torch.autograd.grad(result.sum(), images)
    # the weights of an output pixel add up to 1, so the slopes of an image add up to its number of pixels
    torch.testing.assert_close(slope.sum((2, 3)), torch.full((4, 2), float(size[0] * size[1])).double())
    assert torch.autograd.gradcheck(lambda x: crop(x, boxes), (images,), fast_mode=True)
