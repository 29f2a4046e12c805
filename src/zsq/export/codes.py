"""Codes as a file stores them: sign, zero point and width of the container."""

from dataclasses import dataclass

from torch import Tensor

from zsq.export.targets import Target
from zsq.quant.affine import along_axis
from zsq.quant.engine_biases import spare_factor
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer


@dataclass(frozen=True)
class StoredCodes:
    """Integers that stand for scale / finer * (codes - zero_point).

    Attributes:
        codes: int64; any shape, for an activation a range (2,): its smallest and largest code.
        zero_point: int64, (C,) or a scalar.
        width: bits of the container.
        signed: whether the container is.
        finer: what the quantizer's scale is divided by, a power of 2.
    """

    codes: Tensor
    zero_point: Tensor
    width: int
    signed: bool
    finer: int = 1

    @property
    def type_name(self) -> str:
        """Its ONNX type: INT4, UINT8 ..."""
        return f"{'' if self.signed else 'U'}INT{self.width}"

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer of the container."""
        return (
            (-(2 ** (self.width - 1)), 2 ** (self.width - 1) - 1) if self.signed else (0, 2**self.width - 1)
        )


def stored_weight(quantizer: WeightQuantizer, target: Target, widths: tuple[int, ...]) -> StoredCodes:
    """A weight in the narrowest signed container; without zero points where the codes fit so.

    Codes that use little of a byte are multiplied by a power of 2 and their scale divided by it, which
    changes no weight: engines round biases to multiples of the inputs' scale times the weights', and lose as
    much less.

    Raises:
        ValueError: zero points must be 0, and no container holds the codes then (`symmetrical` sees to it).
    """
    codes, zero_point = quantizer.codes.long(), quantizer.zero_point.long()
    centred = codes - along_axis(zero_point, codes, quantizer.axis)
    for width in (w for w in widths if w >= quantizer.bits):
        if _fits(centred, width):
            finer = spare_factor(quantizer) if width == 8 else 1
            return StoredCodes(centred * finer, zero_point * 0, width, True, finer)
        if not target.symmetric:
            half = 2 ** (quantizer.bits - 1)
            return StoredCodes(codes - half, zero_point - half, width, True)
    raise ValueError("no container holds these weights without zero points")


def stored_activation(quantizer: ActivationQuantizer, target: Target, widths: tuple[int, ...]) -> StoredCodes:
    """The range of codes and the zero point of an activation in the narrowest container.

    Raises:
        ValueError: as for `stored_weight`.
    """
    zero_point = quantizer.zero_point.long()
    codes = zero_point.new_tensor([0, 2**quantizer.bits - 1])
    for width in (w for w in widths if w >= max(quantizer.bits, target.activation_width)):
        if not target.symmetric:
            return StoredCodes(codes, zero_point, width, False)
        if _fits(codes - zero_point, width):
            return StoredCodes(codes - zero_point, zero_point * 0, width, True)
    raise ValueError("no container holds these activations without a zero point")


def _fits(codes: Tensor, width: int) -> bool:
    return bool(codes.min() >= -(2 ** (width - 1))) and bool(codes.max() < 2 ** (width - 1))
