"""Equal ranges of the channels that a LayerNorm returns, by a rewrite of weights that keeps the function."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from zsq.graph.blocks import extract
from zsq.graph.fold import store
from zsq.graph.nodes import aten, weight_node
from zsq.graph.tensors import get_tensor

NARROWEST = 1e-2  # of a channel's range, as a share of the mean range: narrower ones count as so wide
_COPIES = frozenset({aten.contiguous.default, aten.clone.default})


@dataclass(frozen=True)
class NormLayers:
    """A LayerNorm over channels whose result only layers read, each all channels of a position at once.

    Attributes:
        norm: name of its node.
        layers: names of the layers.
    """

    norm: str
    layers: tuple[str, ...]


def norm_layers(graph: fx.Graph) -> list[NormLayers]:
    """The LayerNorms of a graph whose channels can be scaled and shifted, in order.

    Factors and shifts of their own; readers, through permutations and reshapes that keep channels together,
    are linear layers, and convolutions without groups and padding, whose weights no other node reads.
    """
    found = []
    for node in graph.nodes:
        if node.target is not aten.layer_norm.default or len(node.args) < 4 or len(node.args[1]) != 1:
            continue
        if not all(_is_own(graph, a, node) for a in node.args[2:4]):
            continue
        layers = _readers(node, len(node.meta["val"].shape) - 1)
        if layers and all(_is_own(graph, layer.args[1], layer) for layer in layers):
            found.append(NormLayers(node.name, tuple(layer.name for layer in layers)))
    return found


@torch.no_grad()
def channel_ranges(graph_module: fx.GraphModule, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Lowest and highest value of each channel, (C,), that the LayerNorms of `norm_layers` return.

    Args:
        graph_module: captured network.
        images: (N, C, H, W), normalised.
    """
    names = [pair.norm for pair in norm_layers(graph_module.graph)]
    if not names:
        return {}
    image = next(n.name for n in graph_module.graph.nodes if n.op == "placeholder")
    values = extract(graph_module, [image], names)(images)
    rows = [v.flatten(0, -2) for v in values]
    return {name: (v.amin(0), v.amax(0)) for name, v in zip(names, rows, strict=True)}


@torch.no_grad()
def equalize_norms(
    graph_module: fx.GraphModule, ranges: Mapping[str, tuple[Tensor, Tensor]]
) -> fx.GraphModule:
    """A copy in which every channel that such a LayerNorm returns has the same range; the same function.

    With w_c = hi_c - lo_c, w their mean, a_c = -lo_c / w_c and a their mean (0 or 1 beyond these, so that no
    code is wasted), channel c becomes (y_c + w_c (a_c - a)) w / w_c, from -a w to (1 - a) w: one scale and
    one zero point a tensor serve all channels as well as one of each a channel did. The factor and the shift
    go into the LayerNorm's own, and their inverses into weights and biases of the layers that read it.

    Args:
        graph_module: captured network; left as it is.
        ranges: from `channel_ranges`.

    Source: RepQ-ViT (arXiv:2212.08254), scale reparametrisation of LayerNorm activations,
    written with ranges in place of scales and zero points, so that it holds for any number of bits.
    """
    module = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph), "Equalized")
    nodes = {node.name: node for node in module.graph.nodes}
    for pair in norm_layers(module.graph):
        lo, hi = ranges[pair.norm]
        width = hi - lo
        width = width.clamp(min=NARROWEST * float(width.mean()))
        if not bool((width > 0).all()):
            continue
        factor, position = width / width.mean(), -lo / width
        shift = width * (position - position.mean().clamp(0, 1))
        norm = nodes[pair.norm]
        gamma, beta = (get_tensor(module, str(a.target)).detach() for a in norm.args[2:4])
        _replace(module, norm, 2, gamma / factor)
        _replace(module, norm, 3, (beta + shift) / factor)
        for layer in (nodes[name] for name in pair.layers):
            weight = get_tensor(module, str(layer.args[1].target)).detach()
            columns = (1, -1, *[1] * (weight.ndim - 2))
            moved = (weight * shift.view(columns)).flatten(1).sum(1)
            bias = layer.args[2] if len(layer.args) > 2 else None
            old = get_tensor(module, str(bias.target)).detach() if isinstance(bias, fx.Node) else 0.0
            _replace(module, layer, 2, old - moved)
            _replace(module, layer, 1, weight * factor.view(columns))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _readers(node: fx.Node, axis: int) -> list[fx.Node]:
    """The layers that read a tensor with channels on `axis`; empty if anything else does."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.target is aten.sym_size.int:
            continue
        if weight_node(user) is not None:
            if not _reads_channels(user, node, axis):
                return []
            found.append(user)
            continue
        moved = _moved_axis(user, node, axis)
        behind = [] if moved is None else _readers(user, moved)
        if not behind:
            return []
        found += [layer for layer in behind if layer not in found]
    return found


def _reads_channels(layer: fx.Node, source: fx.Node, axis: int) -> bool:
    """Whether a layer multiplies all channels of each position, with nothing but them, by its weight."""
    if layer.args[0] is not source:
        return False
    if layer.target is aten.linear.default:
        return axis == len(source.meta["val"].shape) - 1
    if layer.target not in (aten.conv1d.default, aten.conv2d.default) or axis != 1:
        return False
    padding: Any = layer.args[4] if len(layer.args) > 4 else 0
    groups: Any = layer.args[6] if len(layer.args) > 6 else 1
    return bool(groups == 1) and not any(padding if isinstance(padding, (list, tuple)) else [padding])


def _moved_axis(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Where an operation puts the channels; None if it does more than move positions about."""
    if not node.args or node.args[0] is not source:
        return None
    before: Any = source.meta["val"].shape
    after: Any = getattr(node.meta.get("val"), "shape", ())
    rank = len(before)
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return int([d % rank for d in order].index(axis))
    if node.target is aten.transpose.int:
        pair: list[int] = [d % rank for d in node.args[1:3]]  # type: ignore[operator, misc]
        return pair[1 - pair.index(axis)] if axis in pair else axis
    if node.target in (aten.select.int, aten.slice.Tensor):
        cut: Any = node.args[1] if len(node.args) > 1 else 0
        if cut % rank == axis:
            return None
        return axis - (node.target is aten.select.int and cut % rank < axis)
    if node.target in (aten.reshape.default, aten.flatten.using_ints):
        last = axis == rank - 1 and len(after) > 0 and str(before[-1]) == str(after[-1])
        return len(after) - 1 if last else None
    if node.target is aten.pad.default and not any(node.args[1]):  # type: ignore[arg-type]
        return axis
    if node.target is aten.roll.default:
        rolled: Any = node.args[2] if len(node.args) > 2 else ()
        return axis if rolled and axis not in [d % rank for d in rolled] else None
    return axis if node.target in _COPIES else None


def _is_own(graph: fx.Graph, argument: Any, reader: fx.Node) -> bool:
    """Whether an argument is a stored tensor that nothing else reads."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return False
    same = [n for n in graph.nodes if n.op == "get_attr" and n.target == argument.target]
    return {user for n in same for user in n.users} == {reader}


def _replace(module: fx.GraphModule, node: fx.Node, position: int, value: Tensor) -> None:
    """Give a node another tensor for an argument, under the old name if it had one there alone."""
    args = [*node.args, *[None] * (position + 1 - len(node.args))]
    old = args[position]
    own = isinstance(old, fx.Node) and _is_own(module.graph, old, node)
    name = str(old.target) if own and isinstance(old, fx.Node) else f"{node.name}_equalized_{position}"
    with module.graph.inserting_before(node):
        new = store(module, name, value)
    new.meta = dict(old.meta) if isinstance(old, fx.Node) else {"val": value}
    args[position] = new
    node.args = tuple(args)
