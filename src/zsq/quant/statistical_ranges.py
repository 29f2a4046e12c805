"""Activation ranges without images, from what BatchNorm statistics say of each tensor."""

from collections.abc import Mapping

from torch import fx

from zsq.graph.moments import needed
from zsq.graph.normal import Moments
from zsq.quant.affine import choose_qparams
from zsq.quant.attach import Quantizers
from zsq.quant.quantizers import ActivationQuantizer


def set_ranges(student: fx.GraphModule, quantizers: Quantizers, found: Mapping[str, Moments]) -> None:
    """Give every activation quantizer the range between the outermost bounds of its tensor's channels.

    Args:
        student: from `attach`; changed in place.
        quantizers: from `attach`.
        found: moments of the teacher's activations, whose bounds lie at the wanted number of deviations.

    Raises:
        UsageError: the bounds of a tensor could not be derived.

    Source: DFQ (arXiv:1906.04721), section 5: beta +- n gamma, n = 6, cut at 0 by the ReLU that follows.
    """
    for tensor, name in quantizers.activations.items():
        quantizer = student.get_submodule(name)
        assert isinstance(quantizer, ActivationQuantizer)
        bounds = needed(found, tensor)
        scale, zero_point = choose_qparams(
            bounds.lo.min(), bounds.hi.max(), qmin=0, qmax=2**quantizer.bits - 1, symmetric=False
        )
        quantizer.set_range(scale, zero_point)
