"""What is known of images before anything is optimised: mean and deviation of their channels."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zsq.teacher import ModelSpec

# Mean and deviation of RGB pixels in [0, 1] over ImageNet's training images, as everyone uses them.
NATURAL_MEAN, NATURAL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A model's own mean and std count as statistics of its training data inside these bounds (pixels in [0, 1]).
PLAUSIBLE_MEAN, PLAUSIBLE_STD = (0.2, 0.7), (0.12, 0.4)


@dataclass(frozen=True)
class InputPrior:
    """Mean and deviation that each channel of a model's images is expected to have, in normalised units.

    Attributes:
        mean: (C,), or empty for 0.
        std: (C,), > 0, or empty for 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def is_standard(self) -> bool:
        """Whether all channels have mean 0 and deviation 1."""
        return not self.mean

    def of(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each of so many channels."""
        return self.mean or (0.0,) * channels, self.std or (1.0,) * channels

    def apply(self, standard: Tensor) -> Tensor:
        """Images (N, C, H, W) of mean 0 and deviation 1 brought to this mean and deviation."""
        if self.is_standard:
            return standard
        mean, std = (constant(v, standard.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return standard * std + mean


@dataclass(frozen=True)
class PixelLimits:
    """What black and white are for a model, in normalised units.

    Attributes:
        lowest, highest: (C,).
    """

    lowest: tuple[float, ...]
    highest: tuple[float, ...]

    def standard(self, prior: InputPrior, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same before the prior is applied: two tensors (C, 1, 1)."""
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in prior.of(len(self.lowest)))
        lowest, highest = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (self.lowest, self.highest))
        return (lowest - mean) / std, (highest - mean) / std


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as a float32 tensor on a device, copied there once: the host would wait for every copy."""
    return torch.tensor(values, device=device)


STANDARD = InputPrior((), ())  # mean 0 and deviation 1, for any number of channels


def input_prior(spec: ModelSpec) -> InputPrior:
    """The prior of a model's images, from its normalisation.

    Published systems assume that normalised images have mean 0 and deviation 1. That holds if `mean` and
    `std` are statistics of the data; it does not for models that take pixels as 0..255, 0..1 or -1..1. Their
    `mean` and `std` are implausible as statistics; images get those of natural photographs instead.
    """
    channels = spec.input_size[0]
    plausible = all(PLAUSIBLE_MEAN[0] <= m <= PLAUSIBLE_MEAN[1] for m in spec.mean) and all(
        PLAUSIBLE_STD[0] <= s <= PLAUSIBLE_STD[1] for s in spec.std
    )
    if plausible:
        return STANDARD
    grey = sum(NATURAL_MEAN) / 3, sum(NATURAL_STD) / 3
    means = NATURAL_MEAN if channels == 3 else (grey[0],) * channels
    stds = NATURAL_STD if channels == 3 else (grey[1],) * channels
    return InputPrior(
        tuple((m - shift) / scale for m, shift, scale in zip(means, spec.mean, spec.std, strict=True)),
        tuple(s / scale for s, scale in zip(stds, spec.std, strict=True)),
    )


def pixel_limits(spec: ModelSpec) -> PixelLimits:
    """Normalised black and white of a model."""
    pairs = list(zip(spec.mean, spec.std, strict=True))
    return PixelLimits(tuple(-m / s for m, s in pairs), tuple((1 - m) / s for m, s in pairs))
