"""Nodes of a captured graph: which are layers, where they come from, what depends on the images."""

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
LAYERS: dict[Any, int] = {  # operation -> axis of its weight that counts output channels
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv3d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.padding: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.conv_transpose3d.input: 1,
    aten.linear.default: 0,
}

# Operations that move values without changing them; zero padding adds zeros, which quantizers represent.
MOVES = frozenset(
    {
        aten.slice.Tensor,
        aten.pad.default,
        aten.constant_pad_nd.default,
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.roll.default,
        aten.transpose.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.unsqueeze.default,
        aten.contiguous.default,
        aten.clone.default,
    }
)


def weight_node(node: fx.Node) -> fx.Node | None:
    """The get_attr node of a convolution's or linear layer's weight; None for any other node."""
    if node.op != "call_function" or node.target not in LAYERS:
        return None
    weight = node.args[1]
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def layer_name(node: fx.Node) -> str:
    """Name of a weighted node: that of its weight without the last part, `layer1.0.conv1`."""
    weight = weight_node(node)
    if weight is None:
        raise ValueError(f"{node.name} has no weight")
    return str(weight.target).rpartition(".")[0] or str(weight.target)


def writes_in_place(node: fx.Node) -> bool:
    """Whether an operation changes a tensor that it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def module_path(node: fx.Node) -> str:
    """Dotted name of the module whose forward wrote this node; "" for the outermost one."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def activations(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose value depends on the images, in order, without shapes (SymInt) and the output."""
    depends: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder" or any(a in depends for a in node.all_input_nodes):
            value = node.meta.get("val")
            if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int)):
                depends.add(node)
                found.append(node)
    return found


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the graph returns."""
    return list(next(n for n in graph.nodes if n.op == "output").all_input_nodes)
