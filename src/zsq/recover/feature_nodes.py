"""Which tensors of a network fine-tuning looks at besides its logits; found in the graph."""

from collections.abc import Sequence

from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.blocks import Unit
from zsq.graph.capture import aten, output_nodes, weight_node
from zsq.graph.fold import BATCH_NORM
from zsq.quant.scheme import leads_to_layer

CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding})


def logits_node(graph: fx.Graph) -> str:
    """Name of the node that holds the logits (N, K).

    Raises:
        UsageError: the network returns something else.
    """
    outputs = output_nodes(graph)
    shape = _shape(outputs[0])
    if len(outputs) != 1 or len(shape) != 2:
        raise UsageError(
            f"Fine-tuning compares class logits (N, K), but this model returns {len(outputs)} tensors, the "
            f"first of shape {('N', *shape[1:])}. Take a recipe without fine-tuning, e.g. genie."
        )
    return outputs[0].name


def map_node(graph: fx.Graph) -> str:
    """Name of the last convolution that has positions and is no classifier: what class activation maps show.

    It returns (N, C, H, W) with more than one position, and another layer follows it. A classifier that is a
    1x1 convolution is the last layer, so it is never taken, whether it comes after the pooling (where its map
    would be one number) or before.

    Raises:
        UsageError: there is none.

    Source: SynQ (arXiv:2603.18423) takes the last convolution. In MobileNetV2, where that is the classifier,
    the maps of its code are all 0.
    """
    found = [n for n in graph.nodes if n.target in CONVOLUTIONS and _positions(n) > 1 and leads_to_layer(n)]
    if not found:
        raise UsageError(
            "This model has no convolution with more than one position before its last layer, so there are "
            "no class activation maps to align. Give --set fine_tuning.maps=none."
        )
    return str(found[-1].name)


def attention_nodes(graph: fx.Graph, units: Sequence[Unit]) -> tuple[str, ...]:
    """Names of the tensors whose channel attention is compared: what the body of each block returns.

    In a unit of several layers, the convolution with the longest chain of the unit's layers before it (of
    equals the last one), with the BatchNorm that follows it. If no unit has several layers, every unit
    counts.

    Raises:
        UsageError: no unit has a convolution.

    Source: HAST (arXiv:2303.13826) compares the outputs of residual bodies, before the addition, and those of
    pointwise convolutions where there are none.
    """
    several = [unit for unit in units if len(unit.layers) > 1]
    nodes = {node.name: node for node in graph.nodes}
    found = [_body(unit, nodes) for unit in several or units]
    names = tuple(name for name in found if name is not None)
    if not names:
        raise UsageError(
            "This model has no convolution whose channels could be compared. Give --set "
            "fine_tuning.features=none."
        )
    return names


def _body(unit: Unit, nodes: dict[str, fx.Node]) -> str | None:
    depth: dict[fx.Node, int] = {}
    for name in unit.nodes:
        node = nodes[name]
        before = max((depth.get(source, 0) for source in node.all_input_nodes), default=0)
        depth[node] = before + (weight_node(node) is not None)
    layers = [nodes[name] for name in unit.layers if nodes[name].target in CONVOLUTIONS]
    if not layers:
        return None
    deepest = max(depth[layer] for layer in layers)
    last = [layer for layer in layers if depth[layer] == deepest][-1]
    norms = [user for user in last.users if user.target is BATCH_NORM]
    return str(norms[0].name if len(last.users) == len(norms) == 1 else last.name)


def _positions(node: fx.Node) -> int:
    *_, height, width = _shape(node)
    return height * width if isinstance(height, int) and isinstance(width, int) else 0


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()
