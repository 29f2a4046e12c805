"""Undo the mean shift that rounded weights cause, from BatchNorm statistics alone."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from zsq.graph.channels import channel_sums
from zsq.graph.fold import store
from zsq.graph.moments import needed
from zsq.graph.nodes import LAYERS, weight_node
from zsq.graph.normal import Moments
from zsq.graph.tensors import get_tensor
from zsq.quant.attach import Quantizers

Changes = dict[str, Tensor]  # by layer: what is added to its bias, (C,)


@torch.no_grad()
def correct_biases(
    teacher: fx.GraphModule, student: fx.GraphModule, quantizers: Quantizers, found: Mapping[str, Moments]
) -> None:
    """Take from every layer's bias what its rounded weights add to the mean of its output, in place.

    With e = rounded weight - weight and E[x] the mean of the layer's input, output channel o is shifted by
    sum over input channels i and kernel positions of e_oi E[x_i]; zeros that the layer pads are ignored. A
    layer without bias gets one. Transposed convolutions stay as they are.

    Args:
        teacher: what the student was attached to; untouched.
        student: from `attach`, its weights rounded.
        quantizers: from `attach`.
        found: moments of the teacher's activations.

    Raises:
        UsageError: the mean of a layer's input could not be derived.

    Source: DFQ (arXiv:1906.04721), section 4.2, equations 16 and 17.
    """
    changes: Changes = {}
    for node in correctable(teacher.graph):
        weight, source = weight_node(node), node.args[0]
        assert weight is not None and isinstance(source, fx.Node)
        rounded = student.get_submodule(quantizers.weights[node.name])()
        error = rounded - get_tensor(teacher, str(weight.target))
        mean = needed(found, source.name).mean
        changes[node.name] = -(channel_sums(error, node, len(mean)) @ mean)
    apply_changes(student, changes)


def correctable(graph: fx.Graph) -> list[fx.Node]:
    """The layers that `correct_biases` corrects."""
    return [node for node in graph.nodes if weight_node(node) is not None and LAYERS[node.target] == 0]


def apply_changes(student: fx.GraphModule, changes: Changes) -> None:
    """Add to the biases of layers, by the layers' names; a layer without one gets it."""
    own = {node.name: node for node in student.graph.nodes}
    for name, change in changes.items():
        _shift_bias(student, own[name], change)
    student.graph.eliminate_dead_code()
    student.graph.lint()
    student.recompile()


def _shift_bias(student: fx.GraphModule, layer: fx.Node, change: Tensor) -> None:
    bias = layer.args[2] if len(layer.args) > 2 else None
    value = change
    if isinstance(bias, fx.Node):
        value = change + get_tensor(student, str(bias.target))
    with student.graph.inserting_before(layer):
        node = store(student, f"corrected_biases.{layer.name}", value)
    layer.args = (*layer.args[:2], node, *layer.args[3:])
