"""How a weight is rounded: to nearest, straight through, or learned (AdaRound, in Genie's form).

Learned rounding writes a weight as scale * (base + h(V)), clipped to the representable range, with an integer
base = floor(w / initial scale) that never changes and h(V) in [0, 1] for each weight's rounding logit V. As
the base does not depend on the scale, scale and V can be trained together.
Sources: AdaRound (arXiv:2004.10568), Genie (arXiv:2212.04780).

In all functions `weight`, `base` and `logits` have one shape; scale and zero point are scalars (axis None) or
(C,) along `axis`; the zero point is integer-valued.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsq.quant.affine import along_axis, quantize

ZETA, GAMMA = 1.1, -0.1
"""The sigmoid is stretched to (GAMMA, ZETA) and cut to [0, 1], so that h reaches 0 and 1 at finite logits."""


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """h(V) = clip((ZETA - GAMMA) * sigmoid(V) + GAMMA, 0, 1), in code units; 0.5 at V = 0."""
    return torch.sigmoid(logits).mul(ZETA - GAMMA).add(GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(y: Tensor) -> Tensor:
    """The logit V with h(V) = y, for y in [0, 1]: -log((ZETA - GAMMA) / (y - GAMMA) - 1), within +-2.398."""
    return -torch.log((ZETA - GAMMA) / (y - GAMMA) - 1)


def rounding_base(weight: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """floor(weight / scale), integer-valued; not clipped and without zero point, as in Genie's code."""
    return (weight / along_axis(scale, weight, axis)).floor_()


def initial_logits(weight: Tensor, scale: Tensor, base: Tensor, axis: int | None = None) -> Tensor:
    """Rounding logits with which the soft weight is `weight` itself, clipped to the representable range."""
    return inverse_rectified_sigmoid(weight / along_axis(scale, weight, axis) - base)


def nearest_codes(
    weight: Tensor, scale: Tensor, zero_point: Tensor, *, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """Codes of round-to-nearest (half to even): `quantize` under its name among the roundings."""
    return quantize(weight, scale, zero_point, qmin=qmin, qmax=qmax, axis=axis)


def hard_codes(
    base: Tensor, logits: Tensor, zero_point: Tensor, *, qmin: int, qmax: int, axis: int | None = None
) -> Tensor:
    """Final codes clip(base + [V >= 0] + zero_point, qmin, qmax), integer-valued.

    With `initial_logits` these are the nearest codes, except that an exact tie goes up.
    """
    return (base + (logits >= 0)).add_(along_axis(zero_point, base, axis)).clamp_(qmin, qmax)


def soft_quantize(
    base: Tensor,
    logits: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None = None,
) -> Tensor:
    """Soft weight scale * (clip(base + h(V) + zero_point, qmin, qmax) - zero_point).

    Differentiable in V and scale. The gradient of the scale is the clipped code minus the zero point, as the
    weight is linear in its scale; a clipped weight passes none to its V. Base and zero point get none.

    Args:
        base: from `rounding_base` with the initial scale, constant.
        logits: rounding logits V, trained.
        scale: step, weight units, trained.
        zero_point: integer-valued.
        qmin, qmax: integer limits.
        axis: channel axis, or None.

    Returns:
        Shape of `base`, weight units.

    Raises:
        ValueError: scale or zero point does not fit `base` and `axis`.
    """
    scale, zero_point = along_axis(scale, base, axis), along_axis(zero_point, base, axis)
    return _soft_quantize(base, logits, scale, zero_point, qmin, qmax)


def rounding_regulariser(logits: Tensor, beta: float | Tensor) -> Tensor:
    """Sum over weights of 1 - |2 h(V) - 1|^beta: 0 when every h is 0 or 1, at most one per weight.

    A sum, not a mean: it is scaled to go with a reconstruction loss summed over channels.

    Args:
        logits: rounding logits V.
        beta: at least 1; a scalar tensor on their device is taken as it is.

    Raises:
        ValueError: beta < 1, where the gradient is unbounded at h = 0.5.
    """
    if not isinstance(beta, Tensor) and beta < 1:
        raise ValueError(f"beta must be at least 1, got {beta}")
    return _regulariser(logits, beta)


def straight_through_round(x: Tensor) -> Tensor:
    """round(x), half to even, whose gradient is that of x."""
    return _rounded(x)


class _SoftQuantize(torch.autograd.Function):
    """In closed form, because autograd would keep six tensors of the weight's size and this keeps two."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, logits: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
    ) -> Tensor:
        sigmoid = torch.sigmoid(logits)
        codes = (sigmoid * (ZETA - GAMMA)).add_(GAMMA).clamp_(0, 1).add_(base).add_(zero_point)
        ctx.save_for_backward(sigmoid, codes, scale, zero_point)
        ctx.limits = qmin, qmax
        return codes.clamp(qmin, qmax).sub_(zero_point).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None, None]:
        sigmoid, codes, scale, zero_point = ctx.saved_tensors
        clipped = codes.clamp(*ctx.limits)
        grad_logits = grad_scale = None
        if ctx.needs_input_grad[2]:
            grad_scale = (clipped - zero_point).mul_(grad).sum_to_size(scale.shape)
        if ctx.needs_input_grad[1]:
            inside = clipped.eq_(codes)  # 1.0 or 0.0
            grad_logits = _sigmoid_slope(sigmoid).mul_(inside).mul_(scale).mul_(grad)
        return None, grad_logits, grad_scale, None, None, None


class _Regulariser(torch.autograd.Function):
    """Value and gradient from one power: |u|^beta = |u|^(beta - 1) |u|, u = 2 h - 1."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, beta: float | Tensor) -> Tensor:
        sigmoid = torch.sigmoid(logits)
        u = (sigmoid * (2 * (ZETA - GAMMA))).add_(2 * GAMMA - 1).clamp_(-1, 1)
        power = u.abs().pow_(beta - 1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_sigmoid_slope(sigmoid).mul_(power).mul_(u.sign()).mul_(-2 * beta))
        return logits.numel() - power.mul_(u.abs_()).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad, None


class _StraightThroughRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _sigmoid_slope(sigmoid: Tensor) -> Tensor:
    """dh/dV from sigmoid(V): (ZETA - GAMMA) sigmoid (1 - sigmoid), and 0 where h is cut to 0 or 1."""
    span = ZETA - GAMMA
    slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1).mul_(span)
    # 0 < h < 1 for sigmoids strictly between -GAMMA / span and (1 - GAMMA) / span. The two are symmetric
    # about 1/2 (ZETA = 1 - GAMMA), so there the slope exceeds its value at both.
    return torch.threshold_(slope, -GAMMA * (1 - GAMMA) / span, 0.0)


_soft_quantize: Callable[..., Tensor] = _SoftQuantize.apply
_regulariser: Callable[..., Tensor] = _Regulariser.apply
_rounded: Callable[..., Tensor] = _StraightThroughRound.apply
