"""BatchNorm in the graph: which layer each one can be folded into, and folding it."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq.graph.capture import LAYERS, aten, get_tensor, layer_name, weight_node

BATCH_NORM = aten.batch_norm.default


@dataclass(frozen=True)
class BatchNormPair:
    """A BatchNorm and the layer that it can be folded into.

    Attributes:
        batch_norm: name of its node.
        layer: name of the convolution or linear node that it follows directly and alone; None if there is none
            (pre-activation, after a ReLU, after a pool or an addition, or the layer's output has other readers).
    """

    batch_norm: str
    layer: str | None


def batch_norm_pairs(graph: fx.Graph) -> list[BatchNormPair]:
    """All BatchNorms in graph order, whoever wrote them (nn.BatchNorm2d, F.batch_norm, timm's BatchNormAct2d)."""
    pairs = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is BATCH_NORM:
            before = node.args[0]
            foldable = (
                isinstance(before, fx.Node) and weight_node(before) is not None and len(before.users) == 1
            )
            pairs.append(
                BatchNormPair(node.name, before.name if foldable and isinstance(before, fx.Node) else None)
            )
    return pairs


def fold_batch_norms(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, list[BatchNormPair]]:
    """A copy in which every BatchNorm that follows a layer directly is part of its weight and bias.

    w' = w * gamma / sqrt(var + eps) per output channel, b' = (b - mean) * gamma / sqrt(var + eps) + beta. Others stay
    as they are. The original is untouched; tensors that do not change are shared.

    Source: Jacob et al., arXiv:1712.05877, section 3.2.
    """
    folded = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph), "Folded")
    pairs = batch_norm_pairs(folded.graph)
    by_name = {node.name: node for node in folded.graph.nodes}
    for pair in pairs:
        if pair.layer is not None:
            _fold(folded, by_name[pair.layer], by_name[pair.batch_norm])
    folded.graph.eliminate_dead_code()
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded, pairs


def _fold(module: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> None:
    weight = weight_node(layer)
    assert weight is not None
    kernel = get_tensor(module, str(weight.target)).detach()
    axis = LAYERS[layer.target]
    groups = layer.args[6] if axis == 1 and len(layer.args) > 6 else 1  # of a transposed convolution
    if axis == 1 and groups != 1:
        return
    gamma, beta, mean, var = (_tensor(module, argument) for argument in norm.args[1:5])
    assert mean is not None and var is not None
    factor = torch.rsqrt(var + float(norm.args[7]))  # type: ignore[arg-type]
    factor = factor if gamma is None else factor * gamma
    bias = _tensor(module, layer.args[2]) if len(layer.args) > 2 else None
    shifted = (-mean if bias is None else bias - mean) * factor
    shape = [1] * kernel.ndim
    shape[axis] = -1
    path = f"{layer_name(layer)}_folded_{norm.name}"
    holder = nn.Module()
    holder.register_parameter("weight", nn.Parameter(kernel * factor.view(shape), requires_grad=False))
    holder.register_parameter(
        "bias", nn.Parameter(shifted if beta is None else shifted + beta, requires_grad=False)
    )
    module.add_submodule(path, holder)
    with module.graph.inserting_before(layer):
        new_weight, new_bias = (module.graph.get_attr(f"{path}.{leaf}") for leaf in ("weight", "bias"))
    new_weight.meta = dict(weight.meta)
    args: list[Any] = list(layer.args)
    args[1:3] = [new_weight, new_bias]
    layer.args = tuple(args)
    norm.replace_all_uses_with(layer)
    module.graph.erase_node(norm)


def _tensor(module: fx.GraphModule, argument: Any) -> Tensor | None:
    return get_tensor(module, str(argument.target)).detach() if isinstance(argument, fx.Node) else None
