"""Loops over memory that quantizers spend their time in, compiled where a C compiler is at hand (fused.c).

They return what the PyTorch operations beside them return, bit for bit, so that results do not depend on
whether there is a compiler.
"""

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsq.compiled import shared_library
from zsq.quant.choice import Choice

_LONG, _INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
_STEP: list[Any] = [_LONG, _INT, _POINTER, _POINTER, _INT, *[_FLOAT] * 5]  # up to what is written


class Levels:
    """What values are rounded to: multiples of `scale` from `lowest` to `highest` times it.

    Args:
        scale: scalar on the CPU.
        zero_point: a number, or a scalar tensor on the CPU, which is added and taken off again.
        qmin, qmax: integer limits.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor | float, qmin: int, qmax: int) -> None:
        shift = float(zero_point)
        zero, added = (0.0, shift) if isinstance(zero_point, Tensor) else (-0.0, -0.0)
        self.numbers = float(scale), qmin - shift, qmax - shift, zero, added


class Kernels:
    """The functions of fused.c, for the tensors that `kernels_for` lets pass.

    Args:
        library: the compiled file.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._step = library.learned_step
        self._backward = library.learned_step_backward
        self._mixed = library.mixed_rows
        self._step.argtypes = [*_STEP, _POINTER]
        self._backward.argtypes = [*_STEP, _POINTER, _POINTER, _POINTER]
        self._mixed.argtypes = [_LONG, _LONG, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _POINTER]
        for function in (self._step, self._backward, self._mixed):
            function.restype = None

    def learned_step(self, x: Tensor, levels: Levels, keep: Choice | None) -> Tensor:
        """`x` rounded, but for the elements of `keep`."""
        result = torch.empty_like(x)
        self._step(*_arguments(x, levels, keep), result.data_ptr())
        return result

    def learned_step_backward(
        self, x: Tensor, grad: Tensor, levels: Levels, keep: Choice | None, *, of_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient of `x`, and if asked for, what adds up to the scale times its gradient."""
        grad_x = torch.empty_like(x)
        terms = torch.empty_like(x) if of_scale else None
        written = grad.data_ptr(), grad_x.data_ptr(), None if terms is None else terms.data_ptr()
        self._backward(*_arguments(x, levels, keep), *written)
        return grad_x, terms

    def mixed_rows(self, x: Tensor, other: Tensor, index: Tensor, choice: Choice) -> Tensor:
        """`x[index]`, with the chosen elements of `other[index]`; `index` int64, within the tensors."""
        result = torch.empty_like(choice.draws, dtype=x.dtype)
        self._mixed(
            len(index),
            x[0].numel(),
            torch.get_num_threads(),
            index.data_ptr(),
            x.data_ptr(),
            other.data_ptr(),
            choice.draws.data_ptr(),
            choice.below,
            result.data_ptr(),
        )
        return result


@cache
def kernels() -> Kernels | None:
    """The compiled functions; None where there is no compiler, or what it makes does other than PyTorch."""
    library = shared_library(Path(__file__).with_suffix(".c"))
    if library is None:
        return None
    found = Kernels(library)
    if _agrees(found):
        return found
    logging.getLogger("zsq").debug("fused.c is not used: compiled here, it differs from PyTorch.")
    return None


def kernels_for(tensors: Sequence[Tensor]) -> Kernels | None:
    """The compiled functions, if all tensors are float32 on the CPU, without gaps and in one layout."""
    first = tensors[0]
    last = first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    fits = all(
        type(x) in (Tensor, torch.nn.Parameter)  # nothing that stands in for a tensor while a model is traced
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous(memory_format=layout)
        for x in tensors
    )
    return kernels() if fits else None


def _arguments(x: Tensor, levels: Levels, keep: Choice | None) -> tuple[int | float | None, ...]:
    draws, below = (None, 0) if keep is None else (keep.draws.data_ptr(), keep.below)
    return x.numel(), torch.get_num_threads(), x.data_ptr(), draws, below, *levels.numbers


def _agrees(found: Kernels) -> bool:
    """Whether they compute what PyTorch does, ties and the outermost values included."""
    rng = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])
    x = torch.cat([torch.arange(-20, 20) * 0.15, torch.randn(4099, generator=rng), special])
    grad, draws = torch.randn(len(x), generator=rng), torch.arange(len(x)).to(torch.uint8)
    keep, levels = Choice(draws, 100), Levels(torch.tensor(0.3), 2.0, 0, 7)
    v, kept = x / 0.3, draws < 100
    result = torch.where(kept, x, v.clamp(-2, 5).round() * 0.3)
    passing = kept | (v.clamp(-2, 5) == v)
    terms = (result - x * passing) * grad
    index = torch.tensor([1, 0])
    rows, other = x.view(5, -1), grad.view(5, -1)
    pairs = [
        (found.learned_step(x, levels, keep), result),
        *zip(
            found.learned_step_backward(x, grad, levels, keep, of_scale=True),
            (grad * passing, terms),
            strict=True,
        ),
        (
            found.mixed_rows(rows, other, index, Choice(draws.view(5, -1)[:2], 100)),
            torch.where(kept.view(5, -1)[:2], other[index], rows[index]),
        ),
    ]
    return all(a is not None and torch.equal(a, b) for a, b in pairs)
