"""Brightness, tint and contrast of images: what each image of a batch is held to."""

import torch
from torch import Tensor

from zsq.images.look_settings import Variety
from zsq.images.losses import Looks, pixel_statistics
from zsq.images.prior import InputPrior

LEAST_CONTRAST = 0.2  # of an image, in deviations of all pixels


def draw_looks(num_images: int, channels: int, settings: Variety, rng: torch.Generator) -> Looks:
    """Mean and deviation for every channel of every image, relative to the expected ones; each (N, C).

    Normal numbers, moved and scaled so that pixels of all images together have mean 0 and deviation 1 in
    every channel, which the generator gives them whatever single images are held to.

    Args:
        num_images: N.
        channels: C.
        settings: how far images differ.
        rng: on the CPU.
    """
    brightness, contrast = torch.randn(2, num_images, 1, generator=rng)
    tint = torch.randn(num_images, channels, generator=rng)
    mean = settings.brightness * brightness + settings.tint * tint
    between = settings.brightness**2 + settings.tint**2 + settings.contrast**2
    std = ((1 - between) ** 0.5 + settings.contrast * contrast).clamp(min=LEAST_CONTRAST)
    mean = mean - mean.mean(0)
    total = (mean.square() + std.square()).mean(0).sqrt()
    return mean / total, std / total


def looks_of(images: Tensor, prior: InputPrior) -> Looks:
    """What images have of it, as constants.

    Args:
        images: (N, C, H, W), normalised.
        prior: expected mean and deviation.
    """
    mean, std = pixel_statistics(images.detach(), prior)
    shape = images.shape[:2]
    return mean.view(shape), std.view(shape)
