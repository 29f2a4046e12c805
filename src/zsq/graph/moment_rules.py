"""What an operation makes of the mean, deviation and bounds of its input's channels."""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from zsq.graph.channels import channel_sums, clip_limits
from zsq.graph.nodes import LAYERS, aten, weight_node
from zsq.graph.normal import Moments, clipped_normal
from zsq.graph.tensors import get_tensor

GRID = 401  # points of the quadrature
TAIL = 8.0  # deviations to either side that it covers

# Operations of one tensor, element by element; further arguments are numbers.
POINTWISE = frozenset(
    {
        aten.sigmoid.default,
        aten.silu.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.gelu.default,
        aten.tanh.default,
        aten.leaky_relu.default,
        aten.elu.default,
        aten.mish.default,
        aten.softplus.default,
        aten.neg.default,
    }
)
# What keeps mean and bounds of a channel; its deviation can only become smaller.
POOLS = frozenset(
    {
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.max_pool2d.default,
        aten.upsample_nearest2d.vec,
        aten.contiguous.default,
        aten.clone.default,
    }
)
RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.flatten.using_ints,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.unsqueeze.default,
    }
)


def derived(
    graph_module: fx.GraphModule, node: fx.Node, found: Mapping[str, Moments], deviations: float
) -> Moments | None:
    """Moments of a node from those of its arguments; None where they are not known."""
    if node.target is aten.cat.default:
        parts = [found.get(n.name) for n in node.all_input_nodes]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim != 1 or any(p is None for p in parts):
            return None
        return Moments(*(torch.cat([getattr(p, f) for p in parts]) for f in ("mean", "std", "lo", "hi")))
    if node.target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor):
        return _combined(node, found, deviations)
    source = node.args[0] if node.args else None
    before = found.get(source.name) if isinstance(source, fx.Node) else None
    if before is None or not isinstance(source, fx.Node):
        return None
    if weight_node(node) is not None and LAYERS[node.target] == 0:
        return _layer(graph_module, node, before, deviations)
    limits = clip_limits(node)
    if limits is not None:
        mean, std = clipped_normal(before.mean, before.std, *limits)
        return Moments(mean, std, before.lo.clamp(*limits), before.hi.clamp(*limits))
    if node.target in POINTWISE:
        return _pointwise(lambda x: node.target(x, *node.args[1:], **node.kwargs), before)  # type: ignore[operator]
    if node.target in POOLS:
        return before
    if node.target is aten.mean.dim:
        dims: Any = node.args[1]
        return before if all(d % source.meta["val"].ndim >= 2 for d in dims) else None
    if node.target in RESHAPES:
        return _reshaped(node, source, before)
    if node.target is aten.slice.Tensor:
        dim = node.args[1] if len(node.args) > 1 else 0
        if dim == 0:
            return None
        return before if dim != 1 else _each(before, lambda x: aten.slice.Tensor(x, 0, *node.args[2:]))
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return _padded(node, source, before)
    return None


def _layer(graph_module: fx.GraphModule, node: fx.Node, before: Moments, deviations: float) -> Moments | None:
    weight = weight_node(node)
    assert weight is not None
    kernel = get_tensor(graph_module, str(weight.target)).detach()
    channels = len(before.mean)
    if node.target is aten.linear.default and kernel.shape[1] % channels:
        return None
    mean = channel_sums(kernel, node, channels) @ before.mean
    variance = channel_sums(kernel.square(), node, channels) @ before.std.square()
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, fx.Node):
        mean = mean + get_tensor(graph_module, str(bias.target)).detach()
    return Moments.normal(mean, variance.sqrt(), deviations)


def _combined(node: fx.Node, found: Mapping[str, Moments], deviations: float) -> Moments | None:
    """Sum, difference or product of two tensors that count as independent, or of one and a number."""
    a, b = ((found.get(x.name) if isinstance(x, fx.Node) else x) for x in node.args[:2])
    if node.kwargs.get("alpha", 1) != 1 or not isinstance(a, Moments):
        return None
    multiply = node.target is aten.mul.Tensor
    action: Callable[[Any, Any], Any] = (
        operator.mul if multiply else operator.sub if node.target is aten.sub.Tensor else operator.add
    )
    if isinstance(b, (int, float)):
        ends = torch.stack((action(a.lo, b), action(a.hi, b)))
        std = a.std * abs(b) if multiply else a.std
        return Moments(action(a.mean, b), std, ends.amin(0), ends.amax(0))
    if not isinstance(b, Moments) or len(a.mean) != len(b.mean):
        return None
    corners = torch.stack([action(x, y) for x in (a.lo, a.hi) for y in (b.lo, b.hi)])
    mean = action(a.mean, b.mean)
    if multiply:
        square = (a.std.square() + a.mean.square()) * (b.std.square() + b.mean.square())
        std = (square - mean.square()).clamp(min=0).sqrt()
    else:
        std = (a.std.square() + b.std.square()).sqrt()
    lo = torch.maximum(corners.amin(0), mean - deviations * std)
    return Moments(mean, std, lo, torch.minimum(corners.amax(0), mean + deviations * std))


def _pointwise(function: Callable[[Tensor], Tensor], before: Moments) -> Moments:
    z = torch.linspace(-TAIL, TAIL, GRID, dtype=torch.float64, device=before.mean.device)[:, None]
    weights = torch.exp(-0.5 * z.square())
    weights = weights / weights.sum()
    values = function(before.mean.double() + before.std.double() * z)
    mean = (weights * values).sum(0)
    std = (weights * (values - mean).square()).sum(0).sqrt()
    share = torch.linspace(0, 1, GRID, dtype=torch.float64, device=z.device)[:, None]
    reached = function(before.lo.double() + share * (before.hi.double() - before.lo.double()))
    dtype = before.mean.dtype
    return Moments(mean.to(dtype), std.to(dtype), reached.amin(0).to(dtype), reached.amax(0).to(dtype))


def _reshaped(node: fx.Node, source: fx.Node, before: Moments) -> Moments | None:
    """The same channels, or every position of a channel as one of its own (flatten)."""
    old, new = source.meta["val"].shape, node.meta["val"].shape
    if len(new) < 2 or len(old) < 2 or str(old[0]) != str(new[0]):
        return None
    if new[1] == old[1] and math.prod(new[1:]) == math.prod(old[1:]):
        return before
    if len(new) == 2 and new[1] == math.prod(old[1:]):
        return _each(before, lambda x: x.repeat_interleave(math.prod(old[2:])))
    return None


def _padded(node: fx.Node, source: fx.Node, before: Moments) -> Moments | None:
    """Zeros around the positions, and before or after the channels."""
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    if node.target is aten.constant_pad_nd.default:
        mode, value = "constant", mode if len(node.args) > 2 else 0
    if mode != "constant" or value not in (None, 0, 0.0):
        return None
    pads: Any = list(node.args[1])  # type: ignore[arg-type]
    positions = 2 * (source.meta["val"].ndim - 2)
    front, back = (pads[positions : positions + 2] + [0, 0])[:2]
    if len(pads) > positions + 2 or min(front, back) < 0:
        return None
    if any(pads[:positions]):
        before = replace(before, lo=before.lo.clamp(max=0), hi=before.hi.clamp(min=0))
    return _each(before, lambda x: torch.nn.functional.pad(x, (front, back)))


def _each(before: Moments, function: Callable[[Tensor], Tensor]) -> Moments:
    return Moments(*(function(x) for x in (before.mean, before.std, before.lo, before.hi)))
