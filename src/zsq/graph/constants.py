"""Compute once what does not depend on the images."""

from typing import Any

import torch
from torch import Tensor, fx

from zsq.graph.nodes import LAYERS, activations, aten, module_path, writes_in_place
from zsq.graph.tensors import get_tensor, make_submodule

IMAGES = 2  # for which tensors as long as the batch are computed, to see whether all images have the same


def fold_constants(graph_module: fx.GraphModule) -> None:
    """Make a buffer of what depends on parameters only: standardised weights, tables of positions.

    What is made anew for every image and is the same for all, such as the embedding of positions by a layer,
    is kept for one and expanded. So no layer is left whose input does not depend on the images.
    """
    graph = graph_module.graph
    varying = activations(graph)
    images = varying[0]
    known, of_batch = _values(graph_module, set(varying), images)
    for node in list(graph.nodes):
        value = known.get(node)
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        if all(user in known or not (_counts(user) or user.op == "output") for user in node.users):
            continue
        axis = None
        if node in of_batch:
            axis = _axis_of_images(node, images)
            if axis is None or node.target is aten.expand.default:
                continue
            value = value.narrow(axis, 0, 1)
            if not torch.equal(value.expand_as(known[node]), known[node]):
                continue
        constant = _buffer(graph_module, node, value)
        if axis is not None:
            constant = _expanded(node, constant, axis, images)
        node.replace_all_uses_with(constant)
    for node in reversed(list(graph.nodes)):
        if node in known and not node.users:
            graph.erase_node(node)


def _values(
    graph_module: fx.GraphModule, varying: set[fx.Node], images: fx.Node
) -> tuple[dict[fx.Node, Any], set[fx.Node]]:
    """What does not depend on the images, or on their number alone: tensors, tuples of them, sizes.

    Returns:
        The values for `IMAGES` images, and which of them depend on that number.
    """
    nodes = [n for n in graph_module.graph.nodes if n not in varying and n.op != "output"]
    written = any(map(writes_in_place, nodes))
    known: dict[fx.Node, Any] = {}
    of_batch: set[fx.Node] = set()
    for node in nodes:
        size = _size(node, images)
        if size is not None:
            known[node] = size
            of_batch.add(node)
        elif node.op == "get_attr":
            tensor = get_tensor(graph_module, str(node.target))
            known[node] = tensor.clone() if written else tensor
        elif _counts(node) and all(a in known for a in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
            if any(a in of_batch for a in node.all_input_nodes):
                of_batch.add(node)
    return known, of_batch


def _counts(node: fx.Node) -> bool:
    """Whether an operation is read or writes in place: no assertion, for one."""
    return node.op == "call_function" and (bool(node.users) or writes_in_place(node))


def _size(node: fx.Node, images: fx.Node) -> int | None:
    """A size that depends on nothing but the number of images, for `IMAGES` of them; None for other nodes."""
    value, batch = node.meta.get("val"), _batch(images)
    if not isinstance(value, torch.SymInt) or value.node.expr.free_symbols != {batch}:
        return None
    return int(value.node.expr.subs(batch, IMAGES))


def _batch(images: fx.Node) -> Any:
    """The symbol of the number of images."""
    return images.meta["val"].shape[0].node.expr


def _axis_of_images(node: fx.Node, images: fx.Node) -> int | None:
    """The one axis of a tensor that is as long as there are images, if no other depends on that."""
    shape = node.meta["val"].shape
    found = [axis for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    return found[0] if len(found) == 1 and shape[found[0]].node.expr == _batch(images) else None


def _buffer(graph_module: fx.GraphModule, node: fx.Node, value: Tensor) -> fx.Node:
    """A new buffer with a value, read where a node is; weights keep the name of their layer."""
    layer = next((u for u in node.users if u.target in LAYERS and u.args[1] is node), None)
    path = module_path(layer) if layer is not None else ""
    name = f"{path}.constant_{node.name}".lstrip(".")
    owner, _, leaf = name.rpartition(".")
    make_submodule(graph_module, owner).register_buffer(leaf, value.detach().clone())
    with graph_module.graph.inserting_before(node):
        constant = graph_module.graph.get_attr(name)
    constant.meta = dict(node.meta)
    return constant


def _expanded(node: fx.Node, constant: fx.Node, axis: int, images: fx.Node) -> fx.Node:
    """What is the same for all images, as many times as there are images."""
    with node.graph.inserting_before(node):
        size = node.graph.call_function(aten.sym_size.int, (images, 0))
        size.meta["val"] = images.meta["val"].shape[0]
        shape: list[Any] = [int(n) if k != axis else size for k, n in enumerate(constant.meta["val"].shape)]
        expanded = node.graph.call_function(aten.expand.default, (constant, shape))
    expanded.meta = dict(node.meta)
    constant.meta["val"] = constant.meta["val"].narrow(axis, 0, 1)
    return expanded
