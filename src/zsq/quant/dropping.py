"""The quantizer that lets some values through (QDrop)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zsq.quant.affine import fake_quantize_learned
from zsq.quant.choice import Rows, random_choice
from zsq.quant.quantizers import ActivationQuantizer


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
