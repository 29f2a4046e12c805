"""Random crops and flips, one for every image of a batch, in two matrix products."""

import math

import torch
from torch import Tensor

from zsq.quant.dropping import Rows

ASPECT = 4 / 3  # crops are at most so much wider than high, or higher than wide


def crop_and_flip(images: Tensor, smallest: float, rng: torch.Generator, rows: Rows | None = None) -> Tensor:
    """Every image cut to a random rectangle, brought back to its size, and mirrored with probability 1/2.

    The rectangle's area is uniform in `smallest` .. 1 of the image's, the logarithm of its aspect ratio
    (relative to the image's) uniform in -log ASPECT .. log ASPECT; a side longer than the image's becomes as
    long. Its place is uniform, not bound to whole pixels. Pixels are interpolated linearly.

    Args:
        images: (N, C, H, W), float32.
        smallest: see above.
        rng: on the CPU, so that no device has to be waited for; moved by the same amount in every process.
        rows: which of a minibatch's images these are; draws are made for all of them. None: all.

    Returns:
        (N, C, H, W).

    Source: the resized crops of Inception (arXiv:1409.4842, section 6), scales as in the code of IntraQ and
    SynQ (arXiv:2603.18423); those draw again, up to ten times, where a side is too long.
    """
    height, width = images.shape[-2:]
    rows = rows or Rows(0, len(images), len(images))
    area, shape, top, left, mirrored = torch.rand(5, rows.count, generator=rng)[:, rows.start : rows.stop]
    area = smallest + (1 - smallest) * area
    ratio = torch.exp((2 * shape - 1) * math.log(ASPECT))
    high, wide = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    down = interpolation(height, top * (1 - high), high, torch.zeros_like(left))
    across = interpolation(width, left * (1 - wide), wide, mirrored)
    down, across = down[:, None].to(images.device), across[:, None].to(images.device)
    return down @ images @ across.transpose(-1, -2)


def interpolation(length: int, start: Tensor, share: Tensor, mirrored: Tensor) -> Tensor:
    """Matrices that stretch a part of an axis over the whole of it, linearly between pixel centres.

    Row i takes the value at pixel start * length + share * (i + 1/2) - 1/2, edges repeated.

    Args:
        length: pixels of the axis, L.
        start, share: (N,), of the part, as shares of the axis; start + share <= 1.
        mirrored: (N,), rows are in reverse where it is at least 1/2.

    Returns:
        (N, L, L); rows sum to 1.
    """
    index = torch.arange(length, dtype=start.dtype)
    place = start[:, None] * length + share[:, None] * (index + 0.5) - 0.5
    place = torch.where(mirrored[:, None] < 0.5, place, place.flip(1)).clamp(0, length - 1)
    return (1 - (place[:, :, None] - index).abs()).clamp(min=0)
