"""BatchNorm in the graph: which layer each one can be folded into, and folding it."""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq.graph.nodes import LAYERS, aten, weight_node
from zsq.graph.tensors import get_tensor, make_submodule

BATCH_NORM = aten.batch_norm.default


@dataclass(frozen=True)
class BatchNormPair:
    """A BatchNorm and the layer that it can be folded into.

    Attributes:
        batch_norm: name of its node.
        layer: name of the convolution or linear node that it follows directly and alone; None if there is
            none (pre-activation, after a ReLU, a pool or an addition, other readers of the layer's output,
            another axis than the layer's output channels, or no stored statistics).
    """

    batch_norm: str
    layer: str | None


def batch_norm_pairs(graph: fx.Graph) -> list[BatchNormPair]:
    """All BatchNorms in graph order, whoever wrote them (nn.BatchNorm2d, F.batch_norm, BatchNormAct2d)."""
    pairs = []
    for norm in graph.nodes:
        if norm.op == "call_function" and norm.target is BATCH_NORM:
            before = norm.args[0]
            fits = isinstance(before, fx.Node) and foldable(before, norm)
            pairs.append(BatchNormPair(norm.name, before.name if fits else None))
    return pairs


def fold_batch_norms(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, list[BatchNormPair]]:
    """A copy in which every BatchNorm that follows a layer directly is part of its weight and bias.

    w' = w * gamma / sqrt(var + eps) per output channel, b' = (b - mean) * gamma / sqrt(var + eps) + beta.
    Others stay as they are. Folded layers keep their name, unless their weight serves several layers. The
    original is untouched; tensors that do not change are shared.

    Source: Jacob et al., arXiv:1712.05877, section 3.2.
    """
    folded = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph), "Folded")
    pairs = batch_norm_pairs(folded.graph)
    by_name = {node.name: node for node in folded.graph.nodes}
    for pair in pairs:
        if pair.layer is not None:
            fold_into(folded, by_name[pair.layer], by_name[pair.batch_norm])
    folded.graph.eliminate_dead_code()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded, pairs


def foldable(layer: fx.Node, norm: fx.Node, *, besides: Collection[fx.Node] = ()) -> bool:
    """Whether `norm` scales the output channels of `layer` by constants and is its only reader.

    Args:
        layer: what `norm` normalises.
        norm: a BatchNorm node.
        besides: other readers that do not count.
    """
    return weight_node(layer) is not None and scales_channels(layer, norm, besides=besides)


def scales_channels(layer: fx.Node, norm: fx.Node, *, besides: Collection[fx.Node] = ()) -> bool:
    """What `foldable` says, wherever the layer's weight comes from: in a student, from its quantizer.

    A linear layer needs `meta["shape"]` or torch.export's `meta["val"]`.
    """
    if layer.op != "call_function" or layer.target not in LAYERS:
        return False
    if set(layer.users) - set(besides) != {norm}:
        return False
    if layer.target is aten.linear.default:
        shape = layer.meta["shape"] if "shape" in layer.meta else layer.meta["val"].shape
        if len(shape) != 2:
            return False  # BatchNorm counts channels on axis 1, the layer on the last one
    bias = layer.args[2] if len(layer.args) > 2 else None
    gamma, beta, mean, var, training = norm.args[1:6]
    if mean is None or var is None or training:
        return False
    return all(a is None or _is_stored(a) for a in (bias, gamma, beta, mean, var))


def _is_stored(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def fold_into(module: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> None:
    """Put a BatchNorm into the weight and bias of a layer that it is `foldable` into, and remove its node.

    Args:
        module: a copy of a captured network, changed in place; its tensors are replaced, not overwritten.
        layer, norm: nodes of its graph; readers of `norm` read `layer` afterwards.
    """
    weight = weight_node(layer)
    assert weight is not None
    gamma, beta, mean, var = (_tensor(module, argument) for argument in norm.args[1:5])
    assert mean is not None and var is not None
    factor = torch.rsqrt(var + float(norm.args[7]))  # type: ignore[arg-type]
    factor = factor if gamma is None else factor * gamma
    bias = _tensor(module, layer.args[2]) if len(layer.args) > 2 else None
    shifted = (-mean if bias is None else bias - mean) * factor
    kernel = get_tensor(module, str(weight.target)).detach()
    name = str(weight.target)
    if _readers(module.graph, name) != {layer}:
        name = f"{name}_{norm.name}"
    owner, _, leaf = name.rpartition(".")
    bias_name = f"{owner}.bias".lstrip(".")
    if leaf != "weight" or not _readers(module.graph, bias_name) <= {layer}:
        bias_name = f"{name}_bias"
    with module.graph.inserting_before(layer):
        new_weight = store(module, name, _scaled(kernel, factor, layer))
        new_bias = store(module, bias_name, shifted if beta is None else shifted + beta)
    new_weight.meta = dict(weight.meta)
    args: list[Any] = list(layer.args)
    args[1:3] = [new_weight, new_bias]
    layer.args = tuple(args)
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)


def _scaled(kernel: Tensor, factor: Tensor, layer: fx.Node) -> Tensor:
    """The weight times one factor (C,) per output channel."""
    if LAYERS[layer.target] == 0:
        return kernel * factor.view(-1, *[1] * (kernel.ndim - 1))
    # A transposed convolution: (C_in, C / groups, ...), each group of inputs makes its own output channels.
    groups: Any = layer.args[6] if len(layer.args) > 6 else 1
    by_group: Tensor = kernel.unflatten(0, (groups, -1))
    return (by_group * factor.view(groups, 1, -1, *[1] * (kernel.ndim - 2))).flatten(0, 1)


def _readers(graph: fx.Graph, name: str) -> set[fx.Node]:
    return {user for n in graph.nodes if n.op == "get_attr" and n.target == name for user in n.users}


def store(module: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    """Put a parameter at a dotted name of a copy, whose module tree is its own, and read it.

    Args:
        module: a graph module that was made from another one; the tensors of that stay as they are.
        name: where; a tensor that is there is replaced, for all its readers.
        value: becomes a parameter without gradient.

    Returns:
        A new node that reads it, at the graph's insertion point.
    """
    owner, _, leaf = name.rpartition(".")
    holder = make_submodule(module, owner)
    holder._buffers.pop(leaf, None)
    holder.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return module.graph.get_attr(name)


def _tensor(module: fx.GraphModule, argument: Any) -> Tensor | None:
    return get_tensor(module, str(argument.target)).detach() if isinstance(argument, fx.Node) else None
