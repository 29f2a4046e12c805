"""Random choice between two tensors by element, and the quantizer that lets some values through (QDrop).

A choice is an int32 mask, all bits set or none: on a CPU, blending the bits of two float32 tensors with it
costs a fraction of `torch.where` with a bool mask, and drawing it a fraction of `bernoulli_`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zsq.quant.affine import fake_quantize_learned
from zsq.quant.quantizers import ActivationQuantizer


def random_choice(shape: torch.Size, prob: float, rng: torch.Generator) -> Tensor:
    """An int32 mask of `shape`, on the device of `rng`: -1 (all bits) with probability `prob`, else 0.

    The probability is exact to 2^-31; two elements share one 64-bit draw.
    """
    count = shape.numel()
    draws = torch.empty((count + 1) // 2, dtype=torch.int64, device=rng.device)
    draws.random_(-(2**63), None, generator=rng)
    mask = draws.view(torch.int32)[:count].bitwise_and_(2**31 - 1)
    # Drawn from 0 .. 2^31 - 1: below the threshold the difference is negative and its sign fills the word.
    return mask.sub_(min(round(prob * 2**31), 2**31 - 1)).bitwise_right_shift_(31).view(shape)


def blend(x: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Elements of `other` where `mask` is -1, of `x` where it is 0; bit-exact.

    Float32 and int32, all of one shape; no gradients.
    """
    bits, other_bits = (
        x.detach().contiguous().view(torch.int32),
        other.detach().contiguous().view(torch.int32),
    )
    return bits.bitwise_xor(other_bits).bitwise_and_(mask).bitwise_xor_(bits).view(torch.float32)


def mix(x: Tensor, other: Tensor, prob: float, rng: torch.Generator) -> Tensor:
    """Elements of `other` with probability `prob`, else of `x`; float32, of one shape, no gradients."""
    return blend(x, other, random_choice(x.shape, prob, rng))


class DroppingQuantizer(nn.Module):
    """Stands in for an ActivationQuantizer while a unit is learned.

    Every element keeps its float value with probability `prob`, drawn anew at each call.

    Source: QDrop (arXiv:2203.05740).
    """

    def __init__(self, quantizer: ActivationQuantizer, *, prob: float, rng: torch.Generator) -> None:
        super().__init__()
        self.quantizer, self.prob, self.rng = quantizer, prob, rng

    def forward(self, x: Tensor) -> Tensor:
        """`x` with the chosen elements as they are and the others quantized."""
        inner = self.quantizer
        keep = random_choice(x.shape, self.prob, self.rng)
        return fake_quantize_learned(
            x, inner.scale, inner.zero_point, qmin=0, qmax=2**inner.bits - 1, keep=keep
        )


@contextmanager
def dropping(part: nn.Module, prob: float, rng: torch.Generator) -> Iterator[None]:
    """Within the context, the activation quantizers of `part` drop with probability `prob`."""
    plain = {n: m for n, m in part.named_modules() if isinstance(m, ActivationQuantizer)} if prob > 0 else {}
    for name, quantizer in plain.items():
        part.set_submodule(name, DroppingQuantizer(quantizer, prob=prob, rng=rng))
    try:
        yield
    finally:
        for name, quantizer in plain.items():
            part.set_submodule(name, quantizer)
