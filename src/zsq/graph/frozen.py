"""Layers of a network that is not trained: same values, and a backward pass that does only what it must."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from zsq.graph.nodes import aten


def freeze_batch_norms(graph: fx.Graph) -> None:
    """Put `frozen_batch_norm` in the place of every BatchNorm node: same values, a cheaper backward pass."""
    for node in graph.nodes:
        if node.target is aten.batch_norm.default and not node.args[5]:
            x, weight, bias, mean, var, _, _, eps, _ = node.args
            node.target, node.args = frozen_batch_norm, (x, weight, bias, mean, var, eps)


def frozen_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """BatchNorm with stored statistics, differentiable in `x` only: its gradient is one scaling a channel.

    Args:
        x: (N, C, ...).
        weight: (C,) or None.
        bias: (C,) or None.
        mean: stored, (C,).
        var: stored, (C,).
        eps: added to `var`.
    """
    y: Tensor = _FrozenBatchNorm.apply(x, weight, bias, mean, var, eps)
    return y


def freeze_convolutions(graph: fx.Graph) -> None:
    """Put `frozen_depthwise` in the place of every strided 2-d convolution with groups."""
    for node in graph.nodes:
        if node.target is aten.conv2d.default and len(node.args) > 6:
            stride, padding, dilation, groups = node.args[3:7]
            if groups != 1 and any(s != 1 for s in stride):
                node.target = frozen_depthwise


def frozen_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`torch.conv2d`, differentiable in `x` only.

    On a CPU its gradient is computed in float32 for bfloat16 features, where each group is one channel: the
    bfloat16 kernel of strided depthwise convolutions takes twenty times as long.
    """
    y: Tensor = _FrozenDepthwise.apply(x, weight, bias, stride, padding, dilation, groups)
    return y


class _FrozenDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return torch.conv2d(x, weight, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        slow = grad.device.type == "cpu" and weight.shape[1] == 1
        dtype = torch.promote_types(grad.dtype, torch.float32) if slow else grad.dtype
        grad_x = aten.convolution_backward(
            grad.to(dtype),
            x.to(dtype),
            weight.to(dtype),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [True, False, False],
        )[0]
        return grad_x.to(x.dtype), None, None, None, None, None, None


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(scale if weight is None else weight * scale)
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        # The kernel of BatchNorm scales channels in one pass, in any layout and with float32 factors.
        scaled = torch.batch_norm(grad, scale, None, zero, one, False, 0.0, 0.0, False)
        return scaled, None, None, None, None, None
