"""A picture of many synthetic images, for people."""

import math

import torch
from PIL import Image
from torch import Tensor

from zsq.teacher import ModelSpec

GAP = 2  # pixels between images
SMALL = 64  # images are enlarged by a whole factor to about this many pixels


def contact_sheet(images: Tensor, spec: ModelSpec, *, limit: int = 100) -> Image.Image:
    """The first images in a grid, as pixels: images * std + mean, cut to [0, 1].

    Args:
        images: (N, C, H, W), normalised; C = 3 is shown in colour, else the mean of the channels in grey.
        spec: mean and std of the normalisation.
        limit: how many are shown at most.

    Raises:
        ValueError: no image, or a number of channels other than the spec's.
    """
    n, channels, height, width = images.shape
    if n == 0 or channels != len(spec.mean):
        raise ValueError(f"expected (N > 0, {len(spec.mean)}, H, W), got {tuple(images.shape)}")
    pixels = pixels_of(images[:limit], spec)
    zoom = max(1, SMALL // max(height, width))
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    _, planes, height, width = pixels.shape
    columns = math.ceil(math.sqrt(len(pixels)))
    rows = math.ceil(len(pixels) / columns)
    sheet = torch.ones(planes, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP)
    for index, image in enumerate(pixels):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    return picture(sheet)


def pixels_of(images: Tensor, spec: ModelSpec) -> Tensor:
    """Normalised images (N, C, H, W) as pixels in [0, 1], on the CPU: (N, 3, H, W), in grey (N, 1, H, W)."""
    mean, std = torch.tensor(spec.mean).view(-1, 1, 1), torch.tensor(spec.std).view(-1, 1, 1)
    pixels = (images.detach().float().cpu() * std + mean).nan_to_num(0.0).clamp(0, 1)
    return pixels if pixels.shape[1] == 3 else pixels.mean(1, keepdim=True)


def picture(pixels: Tensor) -> Image.Image:
    """Pixels (3 or 1, H, W) in [0, 1] as a picture of 8 bits."""
    levels = (pixels * 255).round().to(torch.uint8)
    return Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).numpy())
