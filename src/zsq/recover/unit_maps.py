"""Class activation maps at the output of one unit, for reconstruction: what SynQ adds to Genie's."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.blocks import Unit, extract
from zsq.graph.tensors import device_of
from zsq.out_of_memory import in_chunks
from zsq.quant.placement import leads_to_layer
from zsq.recover.feature_nodes import logits_node, positions
from zsq.recover.settings import MapAlignment
from zsq.recover.student_losses import map_distance
from zsq.recover.unit_tensors import CHUNK


class UnitMaps:
    """Distance between the maps of a unit's output in student and teacher.

    While a unit is reconstructed, what follows it in the student is not yet quantized, so there is one set of
    slopes for both: the teacher's, of the logit of the class that it takes the image for.

    Args:
        slopes: (N, C), of all images.
        size: (H, W) of the images.
        settings: weight, and which channels count.
    """

    def __init__(self, slopes: Tensor, size: tuple[int, int], settings: MapAlignment) -> None:
        self._slopes = slopes.clamp(min=0) if settings.channels == "positive" else slopes
        self._size, self._weight = size, settings.weight

    def __call__(self, output: Tensor, target: Tensor, index: Tensor) -> Tensor:
        """Weighted `map_distance` of what student and teacher return, (n, C, H, W), for images of `index`."""
        slopes = self._slopes[index][:, :, None, None]
        maps, wanted = ((slopes * x).sum(1).relu() for x in (output, target))
        return self._weight * map_distance(maps, wanted, self._size)


def map_unit(graph: fx.Graph, units: Sequence[Unit]) -> int:
    """Index of the last unit that returns one tensor (N, C, H, W) with positions and is followed by a layer.

    Raises:
        UsageError: there is none.
    """
    nodes = {node.name: node for node in graph.nodes}
    for index in reversed(range(len(units))):
        outputs = [nodes[name] for name in units[index].outputs]
        if len(outputs) == 1 and positions(outputs[0]) > 1 and leads_to_layer(outputs[0]):
            return index
    raise UsageError(
        "This model has no unit that returns feature maps to a later layer, so there are no class activation "
        "maps to align. Give --set reconstruction.maps=none."
    )


def unit_maps(
    teacher: fx.GraphModule, unit: Unit, outputs: Tensor, size: tuple[int, int], settings: MapAlignment
) -> UnitMaps:
    """The maps of a unit of the teacher.

    Args:
        teacher: captured network.
        unit: from `map_unit`.
        outputs: what the unit returns for all images, (N, C, H, W).
        size: of the images.
        settings: of the alignment.

    Raises:
        UsageError: the model is no classifier, or its logits depend on more than this unit's output.
    """
    try:
        head = extract(teacher, unit.outputs, [logits_node(teacher.graph)])
    except ValueError as error:
        raise UsageError(
            f"Class activation maps of {unit.name} need logits that follow from its output alone: {error}. "
            "Give --set reconstruction.maps=none."
        ) from error

    device = device_of(teacher)

    def slopes(rows: slice) -> Tensor:
        features = outputs[rows].to(device, copy=True).requires_grad_()
        with torch.enable_grad():
            (logits,) = head(features)
            (derivative,) = torch.autograd.grad(logits.amax(1).sum(), features)
        return derivative.mean((2, 3))

    pieces = in_chunks(slopes, len(outputs), CHUNK, "class activation maps")
    return UnitMaps(torch.cat([piece for _, piece in pieces]), size, settings)
