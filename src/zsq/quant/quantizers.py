"""Quantizers as small modules: they hold numbers and call the functions of `affine` and `rounding`.

All codes are unsigned, 0 .. 2^bits - 1. A signed symmetric quantizer of b bits is one whose zero point is
2^(b-1); so no quantizer has a sign flag, and everything it needs is in its state dict.
"""

import math

import torch
from torch import Tensor, nn

from zsq.quant.affine import MIN_SCALE, dequantize, fake_quantize_learned, quantize
from zsq.quant.ranges import error_minimising
from zsq.quant.rounding import hard_codes, initial_logits, rounding_base, soft_quantize


class WeightQuantizer(nn.Module):
    """A quantized weight: integer codes with one scale and zero point an output channel.

    Args:
        codes: uint8, shape of the weight.
        scale: (C,), weight units, > 0.
        zero_point: (C,), integers 0 .. 2^bits - 1.
        bits: 2..8.
        axis: the weight's axis of output channels.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, axis: int) -> None:
        super().__init__()
        self.bits, self.axis = bits, axis
        self.register_buffer("codes", codes.detach().to(torch.uint8).contiguous())
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().to(torch.uint8))

    def forward(self) -> Tensor:
        """The weight that the codes stand for, in float."""
        return dequantize(
            self.codes.to(self.scale.dtype), self.scale, self.zero_point.to(self.scale.dtype), axis=self.axis
        )

    def extra_repr(self) -> str:
        return f"bits={self.bits}, shape={tuple(self.codes.shape)}"


def quantize_weight(weight: Tensor, *, bits: int, axis: int, symmetric: bool = False) -> WeightQuantizer:
    """Round a weight to nearest with the range of least 2.4-norm error, per output channel.

    Args:
        weight: float.
        bits: 2..8.
        axis: of output channels.
        symmetric: zero point 2^(bits-1) and as many codes above it as below; else any zero point.

    Source: BRECQ, Genie (arXiv:2212.04780), initialisation of the weight quantizer.
    """
    weight = weight.detach()
    scale, zero_point = error_minimising(weight, bits=bits, signed=symmetric, symmetric=symmetric, axis=axis)
    zero_point = zero_point + symmetric * 2 ** (bits - 1)
    codes = quantize(weight, scale, zero_point, qmin=int(symmetric), qmax=2**bits - 1, axis=axis)
    return WeightQuantizer(codes, scale, zero_point, bits=bits, axis=axis)


class LearnedRounding(nn.Module):
    """A weight whose rounding and scales are learned; stands in for a WeightQuantizer during reconstruction.

    The integer base floor(W / s) is fixed by the initial scale and stays constant while the scale is trained
    (Genie, arXiv:2212.04780, section on the quantization algorithm).
    """

    base: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, nearest: WeightQuantizer) -> None:
        super().__init__()
        self.bits, self.axis = nearest.bits, nearest.axis
        weight = weight.detach()
        base = rounding_base(weight, nearest.scale, axis=self.axis)
        self.register_buffer("base", base)
        self.register_buffer("zero_point", nearest.zero_point.to(weight.dtype))
        self.scale = nn.Parameter(nearest.scale.clone())
        self.rounding_logits = nn.Parameter(initial_logits(weight, nearest.scale, base, axis=self.axis))

    def forward(self) -> Tensor:
        """The soft weight, differentiable in `scale` and `rounding_logits`."""
        return soft_quantize(
            self.base,
            self.rounding_logits,
            self.scale,
            self.zero_point,
            qmin=0,
            qmax=2**self.bits - 1,
            axis=self.axis,
        )

    @torch.no_grad()
    def harden(self) -> WeightQuantizer:
        """Decide every rounding: up where the logit is >= 0, else down."""
        codes = hard_codes(
            self.base, self.rounding_logits, self.zero_point, qmin=0, qmax=2**self.bits - 1, axis=self.axis
        )
        return WeightQuantizer(
            codes, self.scale.clamp(min=MIN_SCALE), self.zero_point, bits=self.bits, axis=self.axis
        )


class ActivationQuantizer(nn.Module):
    """Quantizes a tensor with one learned scale (LSQ). Until it is calibrated, its scale is NaN.

    Args:
        bits: 2..8.
    """

    zero_point: Tensor

    def __init__(self, *, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.tensor(math.nan), requires_grad=False)
        self.register_buffer("zero_point", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to at most 2^bits levels; straight-through in x, LSQ's gradient in the scale."""
        return fake_quantize_learned(x, self.scale, self.zero_point, qmin=0, qmax=2**self.bits - 1)

    @torch.no_grad()
    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Fix scale (> 0) and zero point (0 .. 2^bits - 1), both scalars."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
