"""Quantizers of a student in training: float weights and fixed ranges behind straight-through rounding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zsq.quant.affine import asymmetric_qparams, fake_quantize, fake_quantize_learned, quantize
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from zsq.quant.ranges import minmax


def straight_through_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """`fake_quantize`, same bits, with the gradient of x itself, also where x is clipped.

    Args: as for `fake_quantize`; scale and zero point get no gradient.

    Source: the straight-through estimator as GDFQ's code and those built on it have it.
    """
    return _straight_through(x, scale, zero_point, qmin, qmax, axis)


class TrainedWeight(nn.Module):
    """A float weight that is rounded to nearest in every forward; stands in for a WeightQuantizer.

    Args:
        weight: where it starts.
        quantizer: what it stands in for.
        keep_range: use its scale and zero point always. If not, the range goes from the lowest to the highest
            value of each output channel (0 included), as the weight is at the time.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, weight: Tensor, quantizer: WeightQuantizer, *, keep_range: bool) -> None:
        super().__init__()
        self.bits, self.axis = quantizer.bits, quantizer.axis
        self.weight = nn.Parameter(weight.detach().clone())
        self.register_buffer("scale", quantizer.scale if keep_range else None)
        self.register_buffer("zero_point", quantizer.zero_point.to(weight.dtype) if keep_range else None)

    def forward(self) -> Tensor:
        """What `harden()` would return from its own forward, same bits; gradient of the float weight."""
        scale, zero_point = self.qparams()
        return straight_through_quantize(
            self.weight, scale, zero_point, qmin=0, qmax=2**self.bits - 1, axis=self.axis
        )

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, (C,), that the weight has now; no gradient."""
        if self.scale is not None and self.zero_point is not None:
            return self.scale, self.zero_point
        lo, hi = minmax(self.weight, self.axis)
        return asymmetric_qparams(lo, hi, qmin=0, qmax=2**self.bits - 1)

    @torch.no_grad()
    def harden(self) -> WeightQuantizer:
        """The integer codes of the weight as it is."""
        scale, zero_point = self.qparams()
        codes = quantize(self.weight, scale, zero_point, qmin=0, qmax=2**self.bits - 1, axis=self.axis)
        return WeightQuantizer(codes, scale, zero_point, bits=self.bits, axis=self.axis)


class FixedRange(nn.Module):
    """An activation quantizer whose range stays; stands in for an ActivationQuantizer.

    Args:
        scale, zero_point: scalars.
        bits: 2..8.
        saturated_gradients: whether the gradient passes where x is beyond the range.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, *, bits: int, saturated_gradients: bool) -> None:
        super().__init__()
        self.bits, self.saturated_gradients = bits, saturated_gradients
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to at most 2^bits levels."""
        quantized = straight_through_quantize if self.saturated_gradients else fake_quantize_learned
        return quantized(x, self.scale, self.zero_point, qmin=0, qmax=2**self.bits - 1)


class MovingRange(nn.Module):
    """Watches what an activation quantizer is given, and quantizes it with the average range so far.

    lo and hi are exponential moving averages of the minima and maxima of the minibatches. The averages start
    at 0 and are divided by 1 - momentum^t when they are read, after t minibatches, so that they are weighted
    means; after the first one they are its minimum and maximum. (Published code divides what it stores, in
    every step again: a constant 1 reads 1, 5.3, 17.8, ...)

    Args:
        quantizer: what it stands in for.
        momentum: 0 takes the last minibatch alone.
    """

    sums: Tensor

    def __init__(self, quantizer: ActivationQuantizer, *, momentum: float) -> None:
        super().__init__()
        self.bits, self.momentum, self.count = quantizer.bits, momentum, 0
        self.register_buffer("sums", torch.zeros(2, device=quantizer.scale.device))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Take notice of a minibatch; `x` rounded to at most 2^bits levels, without gradient."""
        self.sums.lerp_(torch.stack(minmax(x)), 1 - self.momentum)
        self.count += 1
        return fake_quantize_learned(x, *self.qparams(), qmin=0, qmax=2**self.bits - 1)

    def range(self) -> tuple[Tensor, Tensor]:
        """The averages (lo, hi), scalars; NaN before anything was seen."""
        lo, hi = self.sums / (1 - self.momentum**self.count) if self.count else self.sums / 0
        return lo, hi

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, scalars, for the average range."""
        return asymmetric_qparams(*self.range(), qmin=0, qmax=2**self.bits - 1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None
    ) -> Tensor:
        if axis is None:
            return fake_quantize_learned(x, scale, zero_point, qmin=qmin, qmax=qmax)  # the same bits, sooner
        return fake_quantize(x, scale, zero_point, qmin=qmin, qmax=qmax, axis=axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return grad, None, None, None, None, None


_straight_through: Callable[..., Tensor] = _StraightThrough.apply
