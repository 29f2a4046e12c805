"""Random crops enlarged to full size, and mirror images, as matrices: the same bits every time."""

import math

import torch
from torch import Tensor

RATIO = math.log(4 / 3)  # bound of the logarithm of width / height
TRIES = 10  # draws of a box before the whole image is taken


def draw_crops(num_images: int, size: tuple[int, int], smallest: float, rng: torch.Generator) -> Tensor:
    """Boxes and mirrors, (N, 5): top, left, height, width in pixels (not whole numbers), and 1 to mirror.

    The area is uniform between `smallest` and 1 of the image's, the logarithm of width / height uniform in
    +-log(4/3); boxes that do not fit are drawn anew, up to ten times. Half of the images are mirrored.

    Args:
        num_images: N.
        size: (H, W).
        smallest: share of the area.
        rng: on the CPU, so that no device has to be waited for.

    Source: random resized crop and flip of torchvision, whose boxes have whole numbers of pixels.
    """
    height, width = size
    draws = torch.rand(num_images, TRIES, 2, generator=rng)
    area = (smallest + (1 - smallest) * draws[..., 0]) * height * width
    ratio = ((2 * draws[..., 1] - 1) * RATIO).exp()
    heights, widths = (area / ratio).sqrt(), (area * ratio).sqrt()
    fits = (heights <= height) & (widths <= width)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    found = fits.any(1)
    h = torch.where(found, heights.gather(1, first).squeeze(1), float(height))
    w = torch.where(found, widths.gather(1, first).squeeze(1), float(width))
    place = torch.rand(num_images, 3, generator=rng)
    return torch.stack(
        (place[:, 0] * (height - h), place[:, 1] * (width - w), h, w, (place[:, 2] < 0.5).float()), 1
    )


def crop(images: Tensor, crops: Tensor) -> Tensor:
    """Each image's box, enlarged to the size of the image by linear interpolation, perhaps mirrored.

    A pixel of the result lies at box start + (i + 1/2) box length / length - 1/2 of the image (pixel centres
    as in `torch.nn.functional.interpolate`, align_corners=False), not beyond the centres of the box's
    outermost pixels. As products with one sparse matrix for rows and one for columns: differentiable, and
    without the colliding additions that sampling has in its backward pass.

    Args:
        images: (N, C, H, W), float32.
        crops: (N, 5), from `draw_crops`, on the same device.
    """
    top, left, height, width, mirror = crops.unbind(1)
    rows = _weights(top, height, images.shape[2])
    columns = _weights(left, width, images.shape[3])
    columns = torch.where(mirror[:, None, None] > 0, columns.flip(1), columns)
    return rows[:, None] @ images @ columns.transpose(1, 2)[:, None]


def _weights(start: Tensor, extent: Tensor, length: int) -> Tensor:
    """(N, length, length): how much of input pixel j is in output pixel i."""
    pixels = torch.arange(length, device=start.device, dtype=start.dtype)
    start, extent = start[:, None], extent[:, None]
    source = start + (pixels + 0.5) * (extent / length) - 0.5
    last = (start + extent - 1).clamp(max=length - 1).maximum(start)
    source = torch.minimum(source.clamp(min=0).maximum(start), last)
    return (1 - (source[..., None] - pixels).abs()).clamp(min=0)
