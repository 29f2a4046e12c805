"""Which tensors of a network fine-tuning looks at besides its logits; found in the graph."""

from collections.abc import Sequence

from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.blocks import Unit
from zsq.graph.fold import BATCH_NORM
from zsq.graph.nodes import activations, aten, output_nodes
from zsq.quant.placement import layer_depths, leads_to_layer

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
    """Name of the deepest convolution that has positions and is no classifier: what maps of classes show.

    It returns (N, C, H, W) with more than one position, another layer follows it, and of those it has the
    longest chain of layers before it (of equals the last one). A classifier that is a 1x1 convolution is
    followed by no layer, so it is never taken, whether it comes after the pooling (where its map would be one
    number) or before.

    Raises:
        UsageError: there is none.

    Source: SynQ (arXiv:2603.18423) takes the last convolution. In MobileNetV2, where that is the classifier,
    the maps of its code are all 0.
    """
    found = [n for n in graph.nodes if n.target in CONVOLUTIONS and positions(n) > 1 and leads_to_layer(n)]
    if not found:
        raise UsageError(
            "This model has no convolution with more than one position before its last layer, so there are "
            "no class activation maps to align. Give --set fine_tuning.maps=none."
        )
    return _deepest(found, layer_depths(activations(graph))).name


def attention_nodes(graph: fx.Graph, units: Sequence[Unit]) -> tuple[str, ...]:
    """Names of the tensors whose channel attention is compared: what the body of each block returns.

    In a unit of several layers, the convolution with the longest chain of layers before it (of equals the
    last one), with the BatchNorm that follows it. If no such unit has a convolution, those of all units
    count.

    Raises:
        UsageError: no unit has a convolution.

    Source: HAST (arXiv:2303.13826) compares the outputs of residual bodies, before the addition, and those of
    pointwise convolutions where there are none.
    """
    depths = layer_depths(activations(graph))
    nodes = {node.name: node for node in graph.nodes}
    layers = [[nodes[name] for name in unit.layers] for unit in units]
    convolutions = [[layer for layer in unit if layer.target in CONVOLUTIONS] for unit in layers]
    blocks = [found for found, unit in zip(convolutions, layers, strict=True) if found and len(unit) > 1]
    blocks = blocks or [found for found in convolutions if found]
    if not blocks:
        raise UsageError(
            "This model has no convolution whose channels could be compared. Give --set "
            "fine_tuning.features=none."
        )
    return tuple(_normalised(_deepest(found, depths)).name for found in blocks)


def _deepest(layers: Sequence[fx.Node], depths: dict[fx.Node, int]) -> fx.Node:
    """The layer with the longest chain of layers before it; of equals the last one."""
    return max(reversed(layers), key=depths.__getitem__)


def _normalised(layer: fx.Node) -> fx.Node:
    """The BatchNorm that alone reads a layer, or the layer itself."""
    readers = list(layer.users)
    return readers[0] if len(readers) == 1 and readers[0].target is BATCH_NORM else layer


def positions(node: fx.Node) -> int:
    """Height times width of a tensor (N, C, H, W); 0 for any other."""
    if len(_shape(node)) != 4:
        return 0
    *_, height, width = _shape(node)
    return height * width if isinstance(height, int) and isinstance(width, int) else 0


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()
