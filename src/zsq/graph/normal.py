"""Channels as normal distributions, and what clipping makes of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-12  # deviations below it count as 0


@dataclass(frozen=True)
class Moments:
    """Channels of a tensor.

    Attributes:
        mean, std: (C,), units of the tensor.
        lo, hi: (C,), between which its values are expected.
    """

    mean: Tensor
    std: Tensor
    lo: Tensor
    hi: Tensor

    @classmethod
    def normal(cls, mean: Tensor, std: Tensor, deviations: float) -> "Moments":
        """Of a normal distribution, bounded at so many deviations."""
        return cls(mean, std, mean - deviations * std, mean + deviations * std)


def clipped_normal(
    mean: Tensor, std: Tensor, lowest: float = -math.inf, highest: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Mean and deviation of min(max(x, lowest), highest) for normal x.

    With a = (lowest - mean) / std, b = (highest - mean) / std, density phi and distribution Phi of the
    standard normal: E = lowest Phi(a) + highest (1 - Phi(b)) + mean (Phi(b) - Phi(a))
    + std (phi(a) - phi(b)), and the like for the square. Computed in float64.

    Args:
        mean, std: any shape, std >= 0.
        lowest, highest: limits; 0 and infinity give ReLU.

    Source: DFQ (arXiv:1906.04721), appendix C.
    """
    m, s = mean.double(), std.double()
    safe = s.clamp(min=SMALLEST)
    a, b = ((limit - m) / safe for limit in (lowest, highest))
    below, above = torch.special.ndtr(a), torch.special.ndtr(-b)
    inside = 1 - below - above
    density_a, density_b = (torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi) for z in (a, b))
    first = m * inside + safe * (density_a - density_b)
    second = (m.square() + safe.square()) * inside
    for limit, share, density, sign in ((lowest, below, density_a, 1), (highest, above, density_b, -1)):
        if math.isfinite(limit):
            first = first + limit * share
            second = second + limit**2 * share + sign * safe * (m + limit) * density
    variance = (second - first.square()).clamp(min=0)
    exact = m.clamp(lowest, highest)
    tiny = s < SMALLEST
    result = torch.where(tiny, exact, first), torch.where(tiny, 0.0, variance.sqrt())
    return result[0].to(mean.dtype), result[1].to(mean.dtype)
