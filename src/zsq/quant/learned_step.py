"""Rounding with a learned step, differentiated in closed form: the function of `fake_quantize_learned`.

Two of one meaning: in PyTorch's operations, and on a CPU with a compiler in one pass each way.
"""

from typing import Any

import torch
from torch import Tensor

from zsq.quant.choice import Choice
from zsq.quant.fused import Levels, kernels_for

Gradients = tuple[Tensor | None, Tensor | None, None, None, None, None]  # of x, of scale


def learned_step(
    x: Tensor, scale: Tensor, zero_point: Tensor | float, qmin: int, qmax: int, keep: Choice | None
) -> Tensor:
    """See `zsq.quant.affine.fake_quantize_learned`.

    The output is scale * (code - zero_point), so with m = 1 where the gradient passes (inside or kept), the
    gradient of the scale is (output - m x) / scale: round(v) - v inside, the limit outside, 0 where kept.
    Both gradients are linear in the incoming one and can be differentiated by it.
    """
    x = x.to(torch.promote_types(x.dtype, scale.dtype))
    function = _LearnedStep if kernels_for((x,)) is None else _FusedStep
    result: Tensor = function.apply(x, scale, zero_point, qmin, qmax, keep)
    return result


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | float,
        qmin: int,
        qmax: int,
        keep: Choice | None,
    ) -> Tensor:
        result, passing = _rounded(x, scale, zero_point, qmin, qmax, keep)
        residual = _residual(result, x, passing) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(passing, residual, scale)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        passing, residual, scale = ctx.saved_tensors
        return _gradients(grad, passing, residual, scale.detach(), ctx.needs_input_grad[0])


class _FusedStep(torch.autograd.Function):
    """Keeps `x` and the bytes of `keep` for the backward pass, nothing of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | float,
        qmin: int,
        qmax: int,
        keep: Choice | None,
    ) -> Tensor:
        fused = kernels_for((x,))
        assert fused is not None
        ctx.save_for_backward(x, scale, None if keep is None else keep.draws)
        ctx.below = None if keep is None else keep.below
        ctx.limits, ctx.levels = (zero_point, qmin, qmax), Levels(scale, zero_point, qmin, qmax)
        return fused.learned_step(x, ctx.levels, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, scale, draws = ctx.saved_tensors
        x, scale = x.detach(), scale.detach()
        keep = None if draws is None else Choice(draws, ctx.below)
        of_x, of_scale = ctx.needs_input_grad[:2]
        if grad.requires_grad and torch.is_grad_enabled():  # to be differentiated again
            zero_point, qmin, qmax = ctx.limits
            result, passing = _rounded(x, scale, zero_point, qmin, qmax, keep)
            return _gradients(grad, passing, _residual(result, x, passing) if of_scale else None, scale, of_x)
        if kernels_for((x, grad)) is None:  # another layout
            grad = torch.empty_like(x).copy_(grad)
        fused = kernels_for((x, grad))
        assert fused is not None
        grad_x, terms = fused.learned_step_backward(x, grad, ctx.levels, keep, of_scale=of_scale)
        grad_scale = None if terms is None else terms.sum() / scale
        return grad_x if of_x else None, grad_scale, None, None, None, None


def _rounded(
    x: Tensor, scale: Tensor, zero_point: Tensor | float, qmin: int, qmax: int, keep: Choice | None
) -> tuple[Tensor, Tensor]:
    """The output, and 1.0 where the gradient passes, else 0.0: bool tensors are dear on a CPU."""
    v = x / scale
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


def _gradients(
    grad: Tensor, passing: Tensor, residual: Tensor | None, scale: Tensor, of_x: bool
) -> Gradients:
    grad_scale = None if residual is None else (residual * grad).sum() / scale
    return grad * passing if of_x else None, grad_scale, None, None, None, None


def _residual(result: Tensor, x: Tensor, passing: Tensor) -> Tensor:
    """What the scale's gradient is, times the scale, for an incoming gradient of 1."""
    return torch.addcmul(result, x, passing, value=-1)
