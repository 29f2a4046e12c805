"""Bounds on rounding errors from a histogram: a search of ranges evaluates only those that can win."""

import torch
from torch import Tensor

NUM_BINS = 2**14
MANY_VALUES = 4 * NUM_BINS  # from where on a histogram is cheaper than what it spares
SLACK = 1e-3  # of what sums in float32 are trusted to, relative


@torch.no_grad()
def may_be_best(
    values: Tensor,
    scales: Tensor,
    lowest: Tensor,
    highest: Tensor,
    exponent: float,
    *,
    known: float = torch.inf,
) -> list[int]:
    """Which candidates can have the smallest mean |x - s clamp(round(x / s), lowest, highest)|^exponent.

    The error of a value is its distance to the nearest level, which changes by no more than the value does:
    all values of a bin have that of its middle, give or take half a bin. Bins sum up to a lower and an upper
    bound for every candidate, and one whose lower bound is above the least upper bound is none of the best.

    Args:
        values: (K,), finite, more than one of them different.
        scales: (M,), of the candidates, > 0.
        lowest, highest: (M,), integer limits of the codes less the zero point.
        exponent: > 0.
        known: an error that has been reached; candidates above it are left out too.

    Returns:
        Their indices, in increasing order; all of them where values are too few for a histogram or of
        16 bits.
    """
    every = list(range(len(scales)))
    if len(values) < MANY_VALUES or values.element_size() < 4:
        return every
    lo, hi = torch.aminmax(values)
    width = (hi - lo) / NUM_BINS
    if not 0 < float(width) < torch.inf:
        return every
    bins = ((values - lo) / width).to(torch.int32).clamp_(max=NUM_BINS - 1)
    counts = torch.bincount(bins, minlength=NUM_BINS)
    filled = counts.nonzero()[:, 0]
    middles, shares = lo + (filled.to(values) + 0.5) * width, counts[filled].to(values) / len(values)
    rounding = torch.finfo(values.dtype).eps * torch.maximum(lo.abs(), hi.abs())
    half = width / 2 + 4 * rounding  # a value next to the edge of a bin may be counted in the next one
    unit = scales.max()  # in which powers neither overflow nor vanish
    steps, lowest, highest = (limit.view(-1, 1) for limit in (scales / unit, lowest, highest))
    middles, half = middles / unit, half / unit
    levels = (middles / steps).round_().clamp_(lowest, highest).mul_(steps)
    errors = levels.sub_(middles).abs_()
    least = (errors - half).clamp_(min=0).pow_(exponent) @ shares
    most = errors.add_(half).pow_(exponent) @ shares
    bound = most.min().clamp(max=known / float(unit) ** exponent) * (1 + SLACK)
    found: list[int] = (~(least * (1 - SLACK) > bound)).nonzero()[:, 0].tolist()  # all, where a bound is NaN
    return found
