"""Ranges for quantizers: min-max, percentile, and the scale that minimises the quantization error.

Each function looks at a whole tensor (axis None, scalar results) or at every channel along `axis` on its own
(results of shape (C,)). Results are detached.
"""

import math

import torch
from torch import Tensor

from zsq.quant.affine import MIN_SCALE, choose_qparams, integer_limits
from zsq.quant.error_bounds import may_be_best

MAX_SAMPLES = 2**20
"""Most values per channel (or tensor) that `percentile` and `error_minimising` look at; beyond it they take
every n-th one. Weights stay below it; the lowest and highest value still come from all of them."""

_BLOCK = 2**17  # values searched at a time: the working set of the search stays in a CPU's cache


def minmax(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Lowest and highest value (lo, hi), scalars or (C,), units of `x`; NaN where `x` has one.

    Raises:
        ValueError: `x` is empty.
    """
    lo, hi = torch.aminmax(_rows(x, axis), dim=1)
    return (lo[0], hi[0]) if axis is None else (lo, hi)


def percentile(x: Tensor, fraction: float, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The quantiles (lo, hi) at 1 - fraction and at `fraction`, linearly interpolated; scalars or (C,).

    Args:
        x: any shape, float.
        fraction: share of the values at or below `hi`, and at or above `lo`: in (0.5, 1]; 1 is `minmax`.
        axis: channel axis, or None.

    Raises:
        ValueError: `fraction` outside (0.5, 1], or `x` is empty.
    """
    if not 0.5 < fraction <= 1:
        raise ValueError(f"fraction must be above 0.5 and at most 1, got {fraction}")
    if fraction == 1:
        return minmax(x, axis)
    rows = _thinned(_rows(x, axis))
    lo, hi = torch.quantile(
        rows, torch.tensor([1 - fraction, fraction], dtype=x.dtype, device=x.device), dim=1
    )
    return (lo[0], hi[0]) if axis is None else (lo, hi)


@torch.no_grad()
def error_minimising(
    x: Tensor,
    *,
    bits: int,
    signed: bool,
    symmetric: bool,
    axis: int | None = None,
    exponent: float = 2.4,
    num_ratios: int = 100,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the smallest mean |x - fake_quantize(x)|^exponent among shrunken ranges.

    The candidates are ratio * s, ratio = 1, 1 - 1 / num_ratios, ..., 1 / num_ratios, where s is the scale
    that `choose_qparams` gives the range from the lowest to the highest value. Shrinking a range about 0
    leaves its zero point where it is, so there is one zero point. Of equal errors the widest range wins.

    The error is measured with the integer limits that `bits` and `signed` give, the ones used afterwards. (In
    Genie's code the search for signed activations has 2^bits - 1 steps over [-max, max] and a zero point,
    while the quantizer has -2^(bits-1) .. 2^(bits-1) - 1 and none.)

    Args:
        x: weights or activations, any shape, float. A channel with more than MAX_SAMPLES values is thinned to
            evenly strided ones for the error (not for its lowest and highest value), always the same ones.
        bits, signed: width and kind of the codes, see `integer_limits`.
        symmetric: [-max|x|, max|x|] if signed, [0, max x] if not; else the range of `x`, with 0 in it.
        axis: channel axis, or None for one pair per tensor.
        exponent: of the error, > 0; below 2 forgives outliers, above 2 fears clipping.
        num_ratios: number of candidates.

    Returns:
        (scale, zero_point), scalars or (C,); scale >= MIN_SCALE, zero_point integer-valued in [qmin, qmax].

    Raises:
        ValueError: bits outside 2..8, num_ratios < 1, exponent <= 0, `x` empty or not finite.

    Source: Genie (arXiv:2212.04780), whose code takes 100 ratios and exponent 2.4, as BRECQ and QDrop do.
    """
    qmin, qmax = integer_limits(bits, signed)
    if num_ratios < 1 or exponent <= 0:
        raise ValueError(f"need num_ratios >= 1 and exponent > 0, got {num_ratios} and {exponent}")
    lo, hi = minmax(x, axis)
    widest, zero_point = choose_qparams(lo, hi, qmin=qmin, qmax=qmax, symmetric=symmetric)
    rows = _thinned(_rows(x, axis))
    size = max(1, _BLOCK // rows.shape[1])
    ratios = [
        _best_ratio(block, scales, (qmin - zeros, qmax - zeros), exponent, num_ratios)
        for block, scales, zeros in zip(
            torch.split(rows, size),
            torch.split(widest.view(-1, 1), size),
            torch.split(zero_point.view(-1, 1), size),
            strict=True,
        )
    ]
    return (widest * torch.cat(ratios).view_as(widest)).clamp_(min=MIN_SCALE), zero_point


@torch.no_grad()
def error_minimising_ends(
    x: Tensor, *, bits: int, exponent: float = 2.4, num_ratios: int = 100
) -> tuple[Tensor, Tensor]:
    """As `error_minimising`, asymmetric and unsigned, but each end of the range is searched on its own.

    A range that shrinks about 0 has to cut both ends alike. That is wrong for what a BatchNorm after a ReLU
    gives: one negative number for all the zeros, a large share of the values, and a long tail above. From the
    best such range the lower end, the upper end and the lower end again move to where the error is smallest.

    Args:
        x: activations, any shape, float; thinned as there, to `_BLOCK` values.
        bits, exponent, num_ratios: as there.

    Returns:
        (scale, zero_point), scalars; codes 0 .. 2^bits - 1.

    Raises:
        ValueError: as there.
    """
    qmin, qmax = integer_limits(bits, signed=False)
    scale, zero_point = error_minimising(
        x, bits=bits, signed=False, symmetric=False, exponent=exponent, num_ratios=num_ratios
    )
    widest = minmax(x)
    if not bool((widest[0] < 0) & (widest[1] > 0)):
        return scale, zero_point
    values = _thinned(_rows(x, None), _BLOCK)[0]
    ends = [(qmin - zero_point) * scale, (qmax - zero_point) * scale]
    lowest = _error(values, scale, zero_point, qmin, qmax, exponent)
    shares = torch.tensor(_ratios(num_ratios)).to(values)
    for end in (0, 1, 0):
        candidates = [end_of_it.expand(num_ratios) for end_of_it in ends]
        candidates[end] = widest[end] * shares
        scales, zeros = choose_qparams(candidates[0], candidates[1], qmin=qmin, qmax=qmax, symmetric=False)
        known = float(lowest)
        for index in may_be_best(values, scales, qmin - zeros, qmax - zeros, exponent, known=known):
            error = _error(values, scales[index], zeros[index], qmin, qmax, exponent)
            if bool(error < lowest):
                lowest, ends = error, [candidate[index] for candidate in candidates]
                scale, zero_point = scales[index], zeros[index]
    return scale, zero_point


def _error(
    values: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, exponent: float
) -> Tensor:
    """Mean of |x - fake_quantize(x)|^exponent."""
    difference = (values / scale).round_().clamp_min_(qmin - zero_point).clamp_max_(qmax - zero_point)
    difference.mul_(scale).sub_(values).abs_()
    return difference.clamp_min_(torch.finfo(values.dtype).tiny).log2_().mul_(exponent).exp2_().mean()


def _best_ratio(
    rows: Tensor, widest: Tensor, limits: tuple[Tensor, Tensor], exponent: float, num_ratios: int
) -> Tensor:
    """For each row of (C, K) the ratio with the smallest error, (C, 1); `widest` and `limits` are (C, 1).

    Errors are in units of widest^exponent. What clipping alone costs only grows as the range shrinks, and it
    is at least the error minus what rounding can cost, (ratio / 2)^exponent; so once that exceeds the lowest
    error in every row, no smaller ratio can win.
    """
    (lo, hi), tiny = limits, torch.finfo(rows.dtype).tiny
    best = torch.ones_like(widest)
    lowest = torch.full_like(widest, math.inf)
    parts = torch.split(rows, _BLOCK, dim=1)
    steps, rounded = torch.empty_like(parts[0]), torch.empty_like(parts[0])
    ratios = _ratios(num_ratios)
    if len(rows) == 1:
        scales = widest[0] * torch.tensor(ratios).to(rows)
        lowest_level, highest_level = (limit[0].expand(num_ratios) for limit in limits)
        chosen = may_be_best(rows[0], scales, lowest_level, highest_level, exponent)
        ratios = [ratios[index] for index in chosen]
    for ratio in ratios:
        total = torch.zeros_like(widest)
        for part in parts:
            v, q = steps[:, : part.shape[1]], rounded[:, : part.shape[1]]
            torch.div(part, widest * ratio, out=v)
            torch.round(v, out=q).clamp_min_(lo).clamp_max_(hi)
            # |r|^p as 2^(p log2 |r|), faster than pow. A zero becomes the smallest normal number, as the
            # logarithm of 0 takes five times as long; its power is 0 again (or negligible, if p < 1.2).
            v.sub_(q).abs_().clamp_min_(tiny).log2_().mul_(exponent).exp2_()
            total += v.sum(dim=1, keepdim=True)
        error = total / rows.shape[1] * ratio**exponent
        better = error < lowest
        best.masked_fill_(better, ratio)
        lowest = torch.minimum(lowest, error)
        if bool((error - (ratio / 2) ** exponent > lowest).all()):
            break
    return best


def _ratios(num_ratios: int) -> list[float]:
    """Of candidates to the widest range: 1, 1 - 1 / num_ratios, ..., 1 / num_ratios."""
    return [1 - index / num_ratios for index in range(num_ratios)]


def _rows(x: Tensor, axis: int | None) -> Tensor:
    """`x` as (C, K), one row per channel; a single row if axis is None. A view where the layout allows it."""
    if x.numel() == 0:
        raise ValueError(f"a range needs at least one value, got a tensor of shape {tuple(x.shape)}")
    x = x.detach()
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)


def _thinned(rows: Tensor, most: int | None = None) -> Tensor:
    """Every n-th column, contiguous, n such that at most `most` (None: MAX_SAMPLES) remain.

    n shares no factor with the row length, so it does not lock onto one channel, row or column of an image.
    """
    length = rows.shape[1]
    stride = math.ceil(length / (most or MAX_SAMPLES))
    while math.gcd(stride, length) > 1:
        stride += 1
    return rows[:, ::stride].contiguous()
