"""Rewrites of weights that leave the function of a network: equalised channels, absorbed biases."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from zsq.graph.channels import by_input_channel, channel_sums, clip_limits
from zsq.graph.fold import store
from zsq.graph.moments import Normals
from zsq.graph.nodes import LAYERS, aten, weight_node
from zsq.graph.tensors import get_tensor

CONVERGED = 1e-3  # largest |log s| of a pass after which no further one is made
# f(s x) = s f(x) for s > 0, channel by channel; reshapes and means are checked besides.
HOMOGENEOUS = frozenset(
    {
        aten.relu.default,
        aten.leaky_relu.default,
        aten.max_pool2d.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.mean.dim,
    }
)
# f(x + c) = f(x) + c besides, so that a bias passes.
SHIFTS = frozenset(
    {
        aten.max_pool2d.default,
        aten.adaptive_avg_pool2d.default,
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.mean.dim,
    }
)


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second alone reads what the first computes, through `between`."""

    first: fx.Node
    second: fx.Node
    between: tuple[fx.Node, ...]


def relu6_to_relu(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose clipping to [0, h] is a ReLU; its function differs where activations exceed h.

    Source: DFQ (arXiv:1906.04721), section 5.1.1, which does so as clipped channels cannot be rescaled.
    """
    result = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph), "Unclipped")
    for node in result.graph.nodes:
        limits = clip_limits(node) if node.op == "call_function" else None
        if limits is not None and limits[0] == 0 and node.target is not aten.relu.default:
            node.target, node.args, node.kwargs = aten.relu.default, node.args[:1], {}
    result.recompile()
    return result


def pairs(graph: fx.Graph) -> list[Pair]:
    """Layers whose channels can be rescaled together, in graph order.

    The first layer is a convolution or linear layer whose output goes, alone, through operations that scale
    with their input, to one further such layer. Layers whose weight or bias others read do not count.
    """
    found = []
    for node in graph.nodes:
        if _is_plain(graph, node):
            between: list[fx.Node] = []
            current = node
            while (reader := _only_reader(current)) is not None:
                if _is_plain(graph, reader):
                    if reader.args[0] is current and _divides(reader, _channels(node)):
                        found.append(Pair(node, reader, tuple(between)))
                    break
                if reader.target not in HOMOGENEOUS or not _keeps_channels(reader):
                    break
                between.append(reader)
                current = reader
    return found


def equalize(
    graph_module: fx.GraphModule, known: Normals, *, passes: int
) -> tuple[fx.GraphModule, dict[str, tuple[Tensor, Tensor]]]:
    """A copy in which paired layers have channels of equal ranges; the same function up to rounding.

    With r1, r2 the largest absolute weights of the first layer's output channel and of the second one's input
    channel, s = sqrt(r1 / r2): the first layer's weights and bias are divided by s, the second one's weights
    multiplied, after which both ranges are sqrt(r1 r2). Channels with a range of 0 stay.

    Args:
        graph_module: a captured network whose BatchNorm is folded; left as it is.
        known: mean and deviation of what layers return, by node name.
        passes: over all pairs, at most; fewer if they converge.

    Returns:
        The copy, and `known` for it.

    Source: DFQ (arXiv:1906.04721), section 4.1, equation 11.
    """
    result = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph), "Equalized")
    normals = dict(known)
    connected = pairs(result.graph)
    for _ in range(passes):
        largest = 0.0
        for pair in connected:
            factors = _equalize_pair(result, pair)
            if pair.first.name in normals:
                mean, std = normals[pair.first.name]
                normals[pair.first.name] = mean / factors, std / factors
            largest = max(largest, float(factors.log().abs().max()))
        if largest < CONVERGED:
            break
    _finish(result)
    return result, normals


def absorb_bias(
    graph_module: fx.GraphModule, known: Normals, *, deviations: float
) -> tuple[fx.GraphModule, dict[str, tuple[Tensor, Tensor]]]:
    """A copy in which large biases before a ReLU have moved into the layer after it.

    c = max(0, mean - deviations * std) of the first layer's output is taken from its bias and, times the
    second layer's weights, added to the bias of that: the same function where the output exceeds c, as
    relu(x) = relu(x - c) + c for x >= c. Pairs with one ReLU between them, whose second layer pads nothing
    (a padded zero has no c to make up for), and whose first one's statistics are known.

    Args:
        graph_module: a captured network whose BatchNorm is folded; left as it is.
        known: mean and deviation of what layers return, by node name.
        deviations: 3 leaves out 0.13 percent of the values, if they are normal.

    Returns:
        The copy, and `known` for it.

    Source: DFQ (arXiv:1906.04721), section 4.1.3.
    """
    result = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph), "Absorbed")
    normals = dict(known)
    for pair in pairs(result.graph):
        kinds = [n.target for n in pair.between]
        one_relu = kinds.count(aten.relu.default) == 1
        if pair.first.name not in normals or not one_relu or _pads(pair.second):
            continue
        if not {*kinds} <= {*SHIFTS, aten.relu.default}:
            continue
        mean, std = normals[pair.first.name]
        shift = (mean - deviations * std).clamp(min=0)
        if not bool((shift > 0).any()):
            continue
        weight = get_tensor(result, _weight_name(pair.second)).detach()
        added = channel_sums(weight, pair.second, len(shift)) @ shift
        _set_bias(result, pair.first, _bias(result, pair.first, -shift))
        _set_bias(result, pair.second, _bias(result, pair.second, added))
        normals[pair.first.name] = mean - shift, std
    _finish(result)
    return result, normals


def _equalize_pair(module: fx.GraphModule, pair: Pair) -> Tensor:
    """Rescale a pair in place of the copy's tensors; the factors s, (C,)."""
    first = get_tensor(module, _weight_name(pair.first)).detach()
    second = get_tensor(module, _weight_name(pair.second)).detach().contiguous()
    inputs = by_input_channel(second, pair.second, len(first))
    ranges = first.abs().flatten(1).amax(1), inputs.abs().amax((1, 3)).flatten()
    usable = (ranges[0] > 0) & (ranges[1] > 0)
    factors = torch.where(usable, (ranges[0] / ranges[1]).sqrt(), 1.0)
    scaled = inputs * factors.view(len(inputs), 1, -1, 1)
    _replace(module, _weight_name(pair.first), first / factors.view(-1, *[1] * (first.ndim - 1)))
    _replace(module, _weight_name(pair.second), scaled.view_as(second))
    bias = pair.first.args[2] if len(pair.first.args) > 2 else None
    if isinstance(bias, fx.Node):
        _replace(module, str(bias.target), get_tensor(module, str(bias.target)).detach() / factors)
    return factors


def _replace(module: fx.GraphModule, name: str, value: Tensor) -> None:
    node = store(module, name, value)
    module.graph.erase_node(node)


def _bias(module: fx.GraphModule, layer: fx.Node, change: Tensor) -> Tensor:
    bias = layer.args[2] if len(layer.args) > 2 else None
    return change + get_tensor(module, str(bias.target)).detach() if isinstance(bias, fx.Node) else change


def _set_bias(module: fx.GraphModule, layer: fx.Node, value: Tensor) -> None:
    bias = layer.args[2] if len(layer.args) > 2 else None
    name = str(bias.target) if isinstance(bias, fx.Node) else f"{_weight_name(layer)}_bias"
    with module.graph.inserting_before(layer):
        node = store(module, name, value)
    layer.args = (*layer.args[:2], node, *layer.args[3:])


def _finish(module: fx.GraphModule) -> None:
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def _weight_name(layer: fx.Node) -> str:
    weight = weight_node(layer)
    assert weight is not None
    return str(weight.target)


def _is_plain(graph: fx.Graph, node: fx.Node) -> bool:
    """A layer with output channels on axis 0 whose tensors nothing else reads, on features (N, C, ...)."""
    weight = weight_node(node)
    if weight is None or LAYERS[node.target] != 0:
        return False
    if node.target is aten.linear.default and node.meta["val"].ndim != 2:
        return False
    bias = node.args[2] if len(node.args) > 2 else None
    tensors = [weight, *([bias] if isinstance(bias, fx.Node) else [])]
    return all(a.op == "get_attr" and {*_readers_of(graph, a)} == {node} for a in tensors)


def _readers_of(graph: fx.Graph, tensor: fx.Node) -> Iterator[fx.Node]:
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == tensor.target:
            yield from node.users


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The only reader of a node's values; sizes do not count."""
    readers = [user for user in node.users if user.target is not aten.sym_size.int]
    return readers[0] if len(readers) == 1 and readers[0].op == "call_function" else None


def _keeps_channels(node: fx.Node) -> bool:
    """Whether channels stay on axis 1 in their order: true of all but some reshapes and means."""
    source: Any = node.args[0]
    old, new = source.meta["val"].shape, node.meta["val"].shape
    if node.target is aten.mean.dim:
        dims: Any = node.args[1]
        return all(d % len(old) >= 2 for d in dims)
    if node.target in (aten.flatten.using_ints, aten.reshape.default):
        return str(old[0]) == str(new[0]) and (len(new) == 2 or new[1] == old[1])
    return True


def _channels(node: fx.Node) -> int:
    return int(node.meta["val"].shape[1])


def _divides(layer: fx.Node, channels: int) -> bool:
    """Whether a layer reads so many channels (a linear one perhaps several positions of each)."""
    source: Any = layer.args[0]
    read = int(source.meta["val"].shape[1])
    return read % channels == 0 if layer.target is aten.linear.default else read == channels


def _pads(layer: fx.Node) -> bool:
    if layer.target is aten.linear.default:
        return False
    padding: Any = layer.args[4] if len(layer.args) > 4 else layer.kwargs.get("padding", 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(p != 0 for p in (padding if isinstance(padding, (list, tuple)) else [padding]))
