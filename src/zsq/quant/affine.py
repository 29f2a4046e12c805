"""Affine quantization: real x <-> integer code, x ~ scale * (code - zero_point). Pure functions.

One rounding everywhere: divide by the scale, round half to even, add the zero point, clip to [qmin, qmax], as
`torch.fake_quantize_*` and ONNX QuantizeLinear do. Papers that clip first and round then mean the same
numbers: the limits are integers and rounding is monotone, so both orders agree on every input.

Codes and zero points are integer-valued tensors of the dtype of `x`, so that one function serves training,
inference and packing. Use float32 or float64; half precision cannot hold x / scale to a fraction of a step.
"""

import torch
from torch import Tensor

from zsq.quant.choice import Choice
from zsq.quant.fused import Limits
from zsq.quant.learned_step import learned_step

MIN_BITS, MAX_BITS = 2, 8

MIN_SCALE = 1e-12
"""Smallest scale that is ever chosen, activation or weight units. A constant zero gets it (and code = zero
point); anything too small for it rounds to zero. Far below useful scales, and 1 / MIN_SCALE stays finite."""


def integer_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code (qmin, qmax): 0 .. 2^bits - 1, or -2^(bits-1) .. 2^(bits-1) - 1 if signed.

    Raises:
        ValueError: `bits` is not one of 2..8.
    """
    if bits not in range(MIN_BITS, MAX_BITS + 1):
        raise ValueError(f"bits must be a whole number from {MIN_BITS} to {MAX_BITS}, got {bits!r}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def choose_qparams(lo: Tensor, hi: Tensor, *, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point with which the codes qmin..qmax cover the real range [lo, hi].

    Symmetric: zero point 0; with qmin < 0 the range is [-m, m], m = max(|lo|, |hi|), and both of its ends are
    representable (the code -2^(bits-1) lies one step beyond); with qmin = 0 it is [0, hi], and values
    below 0 will be clipped. Asymmetric: the range is widened to include 0, which gets an exact code; as the
    zero point is rounded, an end may lie up to half a step beyond the outermost level.

    Args:
        lo, hi: ends of the range, any one shape, real units.
        qmin, qmax: integer limits, qmin <= 0 < qmax.
        symmetric: which of the two forms.

    Returns:
        scale >= MIN_SCALE, and zero_point, integer-valued in [qmin, qmax]; shape and dtype of `lo`.

    Raises:
        ValueError: lo > hi, NaN or infinity in the range, or limits without 0.
    """
    if not qmin <= 0 < qmax:
        raise ValueError(f"the codes must include 0: expected qmin <= 0 < qmax, got {qmin} and {qmax}")
    if symmetric and qmin < 0:
        scale = torch.maximum(lo.abs(), hi.abs()) / min(-qmin, qmax)
    elif symmetric:
        scale = hi.clamp(min=0) / qmax
    else:
        scale, zero_point = asymmetric_qparams(lo, hi, qmin=qmin, qmax=qmax)
    if not bool(((lo <= hi) & torch.isfinite(scale)).all()):
        raise ValueError(f"range must be finite with lo <= hi, got lo {_brief(lo)} and hi {_brief(hi)}")
    if symmetric:
        return scale.clamp(min=MIN_SCALE), torch.zeros_like(scale)
    return scale, zero_point


def asymmetric_qparams(lo: Tensor, hi: Tensor, *, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """`choose_qparams`, asymmetric, without its checks, for which the host would wait for the device.

    A range of NaN or infinity gives a scale of NaN or infinity.
    """
    lo = lo.clamp(max=0)
    scale = ((hi.clamp(min=0) - lo) / (qmax - qmin)).clamp(min=MIN_SCALE)
    return scale, (qmin - lo / scale).round_().clamp_(qmin, qmax)


def along_axis(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """View `values` so that it broadcasts against `x`: (C,) along `axis`, or a scalar if `axis` is None.

    Raises:
        ValueError: `values` does not have that shape.
    """
    expected = () if axis is None else (x.shape[axis],)
    if values.shape != expected:
        raise ValueError(
            f"for shape {tuple(x.shape)} and axis={axis}, scale and zero point must have shape {expected}, "
            f"got {tuple(values.shape)}"
        )
    if axis is None:
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.view(shape)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """Codes clip(round(x / scale) + zero_point, qmin, qmax), half to even; integer-valued, shape of `x`.

    Args:
        x: any shape, real units.
        scale, zero_point: scalars (axis None), or (C,) with one entry for each index along `axis`.
        qmin, qmax: integer limits.
        axis: channel axis of `x`, or None for one scale per tensor.

    Raises:
        ValueError: scale or zero point does not fit `x` and `axis`.
    """
    scale, zero_point = along_axis(scale, x, axis), along_axis(zero_point, x, axis)
    return (x / scale).round_().add_(zero_point).clamp_(qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, *, axis: int | None = None) -> Tensor:
    """Real values scale * (codes - zero_point), shape of `codes` (integer or float dtype), dtype of `scale`.

    Args: as for `quantize`.

    Raises:
        ValueError: scale or zero point does not fit `codes` and `axis`.
    """
    scale, zero_point = along_axis(scale, codes, axis), along_axis(zero_point, codes, axis)
    return (codes.to(scale.dtype) - zero_point).mul_(scale)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """The real values that the codes of `x` stand for: quantize, then dequantize; arguments as there.

    As plain arithmetic its gradient with respect to `x` is zero; `fake_quantize_learned` has a useful one.
    """
    scale, zero_point = along_axis(scale, x, axis), along_axis(zero_point, x, axis)
    # In place: one temporary of the size of x. (Clipping by tensors would save two passes and cost six.)
    return (x / scale).round_().add_(zero_point).clamp_(qmin, qmax).sub_(zero_point).mul_(scale)


def fake_quantize_learned(
    x: Tensor, scale: Tensor, zero_point: Tensor | float, *, qmin: int, qmax: int, keep: Choice | None = None
) -> Tensor:
    """`fake_quantize` per tensor, same bits, with gradients for `x` and `scale` (LSQ).

    With v = x / scale, and "inside" meaning qmin - zero_point <= v <= qmax - zero_point (before rounding):
    d/dx is 1 inside, 0 outside; d/dscale, summed over elements, is round(v) - v inside, qmin - zero_point
    below and qmax - zero_point above. LSQ's factor on the scale's gradient is left to the learning rate.
    For the backward pass `x` is kept where the loops are compiled (`zsq.quant.fused`), else two tensors as
    large (one if the scale is not trained); the numbers are the same.

    Args:
        x: activations, any shape; half precision is computed and returned in float32.
        scale: scalar > 0; the caller keeps it positive during training.
        zero_point: scalar, integer-valued, gets no gradient. As a number it spares four passes over `x`.
        qmin, qmax: integer limits.
        keep: elements of `x` whose (finite) value passes as it is (gradient 1 for x, 0 for the scale). None
            quantizes all.

    Raises:
        ValueError: scale or zero point is not a scalar.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020, equations 2, 3 and 5.
    """
    return learned_step(x, scale, Limits(zero_point, qmin, qmax), keep)


def _brief(values: Tensor) -> str:
    """At most four numbers of a tensor, for a message."""
    shown = ", ".join(f"{value:g}" for value in values.flatten()[:4].tolist())
    return shown if values.numel() <= 4 else f"{shown}, ... ({values.numel()} values)"
