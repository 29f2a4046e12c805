"""Channels of layers: which input channel a weight belongs to, what an operation does to each channel."""

import math
from typing import Any

import torch
from torch import Tensor, fx

from zsq.graph.nodes import aten


def by_input_channel(weight: Tensor, node: fx.Node, channels: int) -> Tensor:
    """A view (groups, O / groups, channels / groups, positions) of a layer's weight, whose axis 0 is O.

    Args:
        weight: of a convolution or linear layer.
        node: the layer.
        channels: of its input; a linear layer may read several positions of each, one after the other.
    """
    if node.target is aten.linear.default:
        return weight.view(1, len(weight), channels, -1)
    groups: Any = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return weight.view(groups, len(weight) // groups, weight.shape[1], -1)


def channel_sums(values: Tensor, node: fx.Node, channels: int) -> Tensor:
    """A layer's weight-shaped tensor, added up over kernel positions, (O, channels); 0 between groups.

    Args: as for `by_input_channel`.
    """
    groups = by_input_channel(values, node, channels).sum(3)
    return torch.block_diag(*groups) if len(groups) > 1 else groups[0]


def clip_limits(node: fx.Node) -> tuple[float, float] | None:
    """Between which values a node clips its first argument; None if it does something else."""
    if node.target is aten.relu.default:
        return 0.0, math.inf
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    given = [*node.args[1:], *([None] * 2)][:2]
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        names = ("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")
        given = [node.kwargs.get(n) if g is None else g for n, g in zip(names, given, strict=True)]
        free = (-1.0, 1.0) if node.target is aten.hardtanh.default else (-math.inf, math.inf)
        limits = [f if g is None else g for f, g in zip(free, given, strict=True)]
        if all(isinstance(v, (int, float)) for v in limits):
            return float(limits[0]), float(limits[1])  # type: ignore[arg-type]
    return None
