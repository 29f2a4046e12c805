"""A student as a function of its float weights, in plain operations, for gradients of any order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from zsq.graph.blocks import extract
from zsq.graph.fold import store
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer


@dataclass(frozen=True)
class PlainPart:
    """A piece of a student whose weights are arguments.

    Attributes:
        module: called as module(*inputs, *weights), returns a tuple of the outputs.
        weights: what the codes stand for, in float, by the name of the weight quantizer.
    """

    module: fx.GraphModule
    weights: dict[str, Tensor]


def plain_part(student: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> PlainPart:
    """The part of a student between named nodes with its weights as arguments; the same values, bit for bit.

    Activations are quantized by `straight_through`, whose gradient in the activations is that of
    `fake_quantize_learned`; unlike that, it can be vectorised over samples by torch.func, and any number of
    derivatives be taken.

    Args:
        student: from `attach`, its weights hard and its ranges set; left as it is.
        inputs: names of the nodes that become its first arguments.
        outputs: names of the nodes that it returns.

    Raises:
        ValueError: the outputs are computed from more than the inputs.
    """
    module = extract(student, inputs, outputs)
    graph = module.graph
    merge_calls(graph)
    weights: dict[str, Tensor] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    placeholders: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        name, quantizer = str(node.target), module.get_submodule(str(node.target))
        if isinstance(quantizer, WeightQuantizer):
            if name not in weights:
                weights[name] = quantizer()
                with graph.inserting_after(last):
                    last = placeholders[name] = graph.placeholder(f"weight_{len(weights)}")
            node.replace_all_uses_with(placeholders[name])
        elif isinstance(quantizer, ActivationQuantizer):
            with graph.inserting_before(node):
                scale, zero_point = (graph.get_attr(f"{name}.{leaf}") for leaf in ("scale", "zero_point"))
                arguments = (node.args[0], scale, zero_point, 0, 2**quantizer.bits - 1)
                node.replace_all_uses_with(graph.call_function(straight_through, arguments))
        else:
            continue
        graph.erase_node(node)
    graph.lint()
    return PlainPart(fx.GraphModule(student, graph, "Plain"), weights)


def merge_calls(graph: fx.Graph) -> None:
    """Call a module once where it is called several times with the same argument.

    `attach` gives every reader of a tensor a call of its own, so that each can draw what it drops; where
    nothing is drawn, one is enough and the values are the same.
    """
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_module":
            same = first.setdefault((node.target, *node.args), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def store_weights(module: fx.GraphModule) -> None:
    """Read weights where their quantizers are called: what these give does not change any more; in place.

    Args:
        module: part of a student, from `extract`, whose calls are merged; the student keeps its quantizers.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_module":
            continue
        name, quantizer = str(node.target), module.get_submodule(str(node.target))
        if isinstance(quantizer, WeightQuantizer):
            with module.graph.inserting_before(node):
                weight = store(module, f"stored_weights.{name}", quantizer().detach())
            weight.meta = dict(node.meta)
            node.replace_all_uses_with(weight)
            module.graph.erase_node(node)
    module.recompile()


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """`fake_quantize` per tensor, same bits, whose gradient is 1 inside the limits and 0 outside.

    Its second derivative is 0: seen from a point, it is the line through that point with this slope.
    """
    v = x / scale
    inside = (v + zero_point).clamp(qmin, qmax) * scale
    codes = (v.detach().round() + zero_point).clamp(qmin, qmax)
    return (codes - zero_point) * scale + (inside - inside.detach())
