"""Loops over memory that quantizers spend their time in, compiled where a C compiler is at hand (fused.c).

They return what the PyTorch operations beside them return, bit for bit, so that results do not depend on
whether there is a compiler.
"""

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsq.compiled import shared_library
from zsq.quant.choice import Choice

_LONG, _INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
_STEP: list[Any] = [_LONG, _INT, _POINTER, _POINTER, _INT, *[_FLOAT] * 5]  # up to what is written


class Limits(NamedTuple):
    """What codes there are.

    Attributes:
        zero_point: a number, or a scalar tensor, which is added and taken off again.
        qmin, qmax: integer limits.
    """

    zero_point: Tensor | float
    qmin: int
    qmax: int


def rounded(x: Tensor, scale: Tensor, limits: Limits, keep: Choice | None) -> tuple[Tensor, Tensor]:
    """In PyTorch's operations: `x` rounded, but for the elements of `keep`, and where the gradient passes.

    The second is 1.0 or 0.0: bool tensors are dear on a CPU.
    """
    v, (zero_point, qmin, qmax) = x / scale, limits
    if isinstance(zero_point, Tensor):
        result = v.round().add_(zero_point).clamp_(qmin, qmax).sub_(zero_point).mul_(scale)
        v.add_(zero_point)
        passing = v.clamp(qmin, qmax).eq_(v)
    else:  # the limits are integers, so that it is one whether one clips or rounds first
        result = v.clamp(qmin - zero_point, qmax - zero_point)
        passing = v.eq_(result)
        result.round_().mul_(scale)
    if keep is not None:
        mask = keep.mask()
        result.lerp_(x, mask)
        torch.maximum(passing, mask, out=passing)
    return result, passing


def residual(result: Tensor, x: Tensor, passing: Tensor) -> Tensor:
    """What the scale's gradient is, times the scale, for an incoming gradient of 1."""
    return torch.addcmul(result, x, passing, value=-1)


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

    def learned_step(self, x: Tensor, scale: Tensor, limits: Limits, keep: Choice | None) -> Tensor:
        """`x` rounded, but for the elements of `keep`."""
        result = torch.empty_like(x)
        self._step(*_arguments(x, scale, limits, keep), result.data_ptr())
        return result

    def learned_step_backward(
        self, x: Tensor, grad: Tensor, scale: Tensor, limits: Limits, keep: Choice | None, *, of_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient of `x`, and if asked for, what adds up to the scale times its gradient."""
        grad_x = torch.empty_like(x)
        terms = torch.empty_like(x) if of_scale else None
        written = grad.data_ptr(), grad_x.data_ptr(), None if terms is None else terms.data_ptr()
        self._backward(*_arguments(x, scale, limits, keep), *written)
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


def _arguments(
    x: Tensor, scale: Tensor, limits: Limits, keep: Choice | None
) -> tuple[int | float | None, ...]:
    draws, below = (None, 0) if keep is None else (keep.draws.data_ptr(), keep.below)
    shift = float(limits.zero_point)
    zero, added = (0.0, shift) if isinstance(limits.zero_point, Tensor) else (-0.0, -0.0)
    numbers = float(scale), limits.qmin - shift, limits.qmax - shift, zero, added
    return x.numel(), torch.get_num_threads(), x.data_ptr(), draws, below, *numbers


def _agrees(found: Kernels) -> bool:
    """Whether they compute what PyTorch does, ties and the outermost values included."""
    rng = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])
    x = torch.cat([torch.arange(-20, 20) * 0.15, torch.randn(4099, generator=rng), special]).view(5, -1)
    grad, index = torch.randn(x.shape, generator=rng), torch.tensor([1, 0])
    keep = Choice(torch.arange(x.numel()).to(torch.uint8).view(5, -1), 100)
    scale, limits = torch.tensor(0.3), Limits(2.0, 0, 7)
    result, passing = rounded(x, scale, limits, keep)
    grad_x, terms = found.learned_step_backward(x, grad, scale, limits, keep, of_scale=True)
    chosen = Choice(keep.draws[:2], 100)
    pairs = [
        (found.learned_step(x, scale, limits, keep), result),
        (grad_x, grad * passing),
        (terms, residual(result, x, passing) * grad),
        (found.mixed_rows(x, grad, index, chosen), torch.lerp(x[index], grad[index], chosen.mask())),
    ]
    return all(a is not None and torch.equal(a, b) for a, b in pairs)
