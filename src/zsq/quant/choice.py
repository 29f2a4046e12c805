"""Random choice of elements, as bytes that are compared with a number.

On a CPU, `lerp` with a float mask of 1.0 and 0.0 costs a twentieth of `torch.where` with a bool mask; a
compiled loop reads the bytes themselves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Images `start` to `stop` of a minibatch of `count`: those that this process of several works on."""

    start: int
    stop: int
    count: int


@dataclass(frozen=True)
class Choice:
    """Which elements of a tensor are chosen.

    Attributes:
        draws: uint8, shape and memory format of the tensor.
        below: an element is chosen where its byte is below this number, 0 (none) to 256 (all).
    """

    draws: Tensor
    below: int

    def mask(self) -> Tensor:
        """1.0 where chosen, else 0.0, float32."""
        return self.draws.to(torch.float32).lt_(self.below)


def random_choice(x: Tensor, prob: float, rng: torch.Generator, rows: Rows | None = None) -> Choice:
    """Elements of `x`, each chosen with probability `prob`; on the device of `rng`.

    The probability is exact to 1/256: eight elements share one 64-bit draw.

    Args:
        x: the first axis counts images, or equally many entries for every image in turn.
        prob: of being chosen.
        rng: moved by the same amount in every process.
        rows: which of a minibatch's images are in `x`; draws are made for all of them, so that the processes
            together draw what one alone draws.
    """
    count = x.numel()
    each = count // (rows.stop - rows.start) if rows is not None else 0
    first, drawn = (each * rows.start, each * rows.count) if rows is not None else (0, count)
    draws = torch.empty((drawn + 7) // 8, dtype=torch.int64, device=rng.device)
    draws.random_(-(2**63), None, generator=rng)
    draws = draws.view(torch.uint8)[first : first + count]
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    draws = draws.as_strided(x.shape, x.stride()) if channels_last else draws.view(x.shape)
    return Choice(draws, round(prob * 256))
