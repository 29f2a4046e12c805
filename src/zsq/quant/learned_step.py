"""Rounding with a learned step, differentiated in closed form: the function of `fake_quantize_learned`.

Two of one meaning: in PyTorch's operations, and on a CPU with a compiler in one pass each way.
"""

from typing import Any

import torch
from torch import Tensor

from zsq.quant.choice import Choice
from zsq.quant.fused import Kernels, Limits, kernels_for, residual, rounded


def learned_step(x: Tensor, scale: Tensor, limits: Limits, keep: Choice | None) -> Tensor:
    """See `zsq.quant.affine.fake_quantize_learned`.

    The output is scale * (code - zero_point), so with m = 1 where the gradient passes (inside or kept), the
    gradient of the scale is (output - m x) / scale: round(v) - v inside, the limit outside, 0 where kept.
    Both gradients are linear in the incoming one and can be differentiated by it.
    """
    x = x.to(torch.promote_types(x.dtype, scale.dtype))
    fused = kernels_for((x,))
    result: Tensor
    if fused is None:
        result = _LearnedStep.apply(x, scale, limits, keep)
    else:
        result = _FusedStep.apply(x, scale, limits, keep, fused)
    return result


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, limits: Limits, keep: Choice | None) -> Tensor:
        result, passing = rounded(x, scale, limits, keep)
        rest = residual(result, x, passing) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(passing, rest, scale)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        passing, rest, scale = ctx.saved_tensors
        return *_gradients(grad, passing, rest, scale.detach(), ctx.needs_input_grad[0]), None, None


class _FusedStep(torch.autograd.Function):
    """Keeps `x` and the bytes of `keep` for the backward pass, nothing of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, limits: Limits, keep: Choice | None, fused: Kernels
    ) -> Tensor:
        ctx.save_for_backward(x, scale, None if keep is None else keep.draws)
        ctx.below = None if keep is None else keep.below
        ctx.limits, ctx.fused = limits, fused
        return fused.learned_step(x, scale, limits, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, scale, draws = ctx.saved_tensors
        x, scale = x.detach(), scale.detach()
        keep = None if draws is None else Choice(draws, ctx.below)
        of_x, of_scale = ctx.needs_input_grad[:2]
        if grad.requires_grad and torch.is_grad_enabled():  # to be differentiated again
            result, passing = rounded(x, scale, ctx.limits, keep)
            rest = residual(result, x, passing) if of_scale else None
            return *_gradients(grad, passing, rest, scale, of_x), None, None, None
        if kernels_for((x, grad)) is None:  # another layout
            grad = torch.empty_like(x).copy_(grad)
        grad_x, terms = ctx.fused.learned_step_backward(x, grad, scale, ctx.limits, keep, of_scale=of_scale)
        grad_scale = None if terms is None else terms.sum() / scale
        return grad_x if of_x else None, grad_scale, None, None, None


def _gradients(
    grad: Tensor, passing: Tensor, rest: Tensor | None, scale: Tensor, of_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and of the scale; `rest` is the `residual`."""
    return grad * passing if of_x else None, None if rest is None else (rest * grad).sum() / scale
