"""Random choice between two tensors by element, and the quantizer that lets some values through (QDrop).

A choice is a float mask of 1.0 and 0.0: on a CPU, `lerp` with it costs a twentieth of `torch.where` with a
bool mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zsq.quant.affine import fake_quantize_learned
from zsq.quant.quantizers import ActivationQuantizer


@dataclass(frozen=True)
class Rows:
    """Images `start` to `stop` of a minibatch of `count`: those that this process of several works on."""

    start: int
    stop: int
    count: int


def random_choice(x: Tensor, prob: float, rng: torch.Generator, rows: Rows | None = None) -> Tensor:
    """1.0 with probability `prob`, else 0.0: float32, shape and memory format of `x`, device of `rng`.

    The probability is exact to 1/256: eight elements share one 64-bit draw.

    Args:
        x: the first axis counts images, or equally many entries for every image in turn.
        prob: of 1.0.
        rng: moved by the same amount in every process.
        rows: which of a minibatch's images are in `x`; draws are made for all of them, so that the processes
            together draw what one alone draws.
    """
    count = x.numel()
    each = count // (rows.stop - rows.start) if rows is not None else 0
    first, drawn = (each * rows.start, each * rows.count) if rows is not None else (0, count)
    draws = torch.empty((drawn + 7) // 8, dtype=torch.int64, device=rng.device)
    draws.random_(-(2**63), None, generator=rng)
    chosen = draws.view(torch.uint8)[first : first + count].to(torch.float32).lt_(round(prob * 256))
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return chosen.as_strided(x.shape, x.stride()) if channels_last else chosen.view(x.shape)


def mix(x: Tensor, other: Tensor, prob: float, rng: torch.Generator, rows: Rows | None = None) -> Tensor:
    """Elements of `other` with probability `prob`, else of `x`; finite, of one shape, no gradients."""
    return torch.lerp(x.detach(), other.detach(), random_choice(x, prob, rng, rows))


class DroppingQuantizer(nn.Module):
    """Stands in for an ActivationQuantizer while a unit is learned.

    Every element keeps its float value with probability `prob`, drawn anew at each call.

    Source: QDrop (arXiv:2203.05740).
    """

    def __init__(
        self, quantizer: ActivationQuantizer, *, prob: float, rng: torch.Generator, rows: Rows | None = None
    ) -> None:
        super().__init__()
        self.quantizer, self.prob, self.rng, self.rows = quantizer, prob, rng, rows
        self.zero_point = float(quantizer.zero_point)  # not learned; here, so that a step waits for no device

    def forward(self, x: Tensor) -> Tensor:
        """`x` with the chosen elements as they are and the others quantized."""
        inner = self.quantizer
        keep = random_choice(x, self.prob, self.rng, self.rows)
        return fake_quantize_learned(
            x, inner.scale, self.zero_point, qmin=0, qmax=2**inner.bits - 1, keep=keep
        )


@contextmanager
def dropping(part: nn.Module, prob: float, rng: torch.Generator, rows: Rows | None = None) -> Iterator[None]:
    """Within the context, the activation quantizers of `part` drop with probability `prob`.

    `rows`: which of a minibatch's images `part` is given, see `random_choice`; None for all of them.
    """
    plain = {n: m for n, m in part.named_modules() if isinstance(m, ActivationQuantizer)} if prob > 0 else {}
    for name, quantizer in plain.items():
        part.set_submodule(name, DroppingQuantizer(quantizer, prob=prob, rng=rng, rows=rows))
    try:
        yield
    finally:
        for name, quantizer in plain.items():
            part.set_submodule(name, quantizer)
