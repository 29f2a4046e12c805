"""Rewrite an exported graph: one tensor in, nothing written in place, nothing that does not count."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from zsq.errors import UsageError
from zsq.graph.nodes import aten, writes_in_place
from zsq.graph.tensors import device_of

# Operations that return their first argument itself on a model in eval mode.
IDENTITIES: frozenset[Any] = frozenset(
    {
        aten.dropout.default,
        aten.dropout_.default,
        aten.feature_dropout.default,
        aten.feature_dropout_.default,
        aten.alpha_dropout.default,
        aten.alpha_dropout_.default,
        aten.feature_alpha_dropout.default,
        aten.feature_alpha_dropout_.default,
        aten.alias.default,
        aten.detach.default,
    }
)

# Operations that do, where the tensor is of that type, on that device, already.
CASTS: frozenset[Any] = frozenset(
    {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}
)
WITH_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
WITH_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_regions(graph_module: fx.GraphModule) -> None:
    """Write out what a forward has within `torch.no_grad()` and `torch.autocast(..., enabled=False)`.

    Raises:
        UsageError: a part of the model is computed in reduced precision.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is WITH_AUTOCAST:
            device, dtype, enabled, _, region, *inputs = node.args
            if enabled and device == device_of(graph_module).type:
                raise UsageError(
                    f"The model computes a part of itself in {dtype} (torch.autocast in its forward), and "
                    "zsq quantizes networks of float32. Take the autocast out, or give it enabled=False."
                )
        elif node.target is WITH_GRAD:
            _, region, *inputs = node.args
        else:
            continue
        part = getattr(graph_module, str(region.target))
        inline_regions(part)
        arguments = (n for n in part.graph.nodes if n.op == "placeholder")
        values: dict[fx.Node, Any] = dict(zip(arguments, inputs, strict=True))
        for inner in part.graph.nodes:
            if inner.op == "output":
                results = [values[n] for n in pytree.tree_leaves(inner.args[0])]
            elif inner.op != "placeholder":
                with graph.inserting_before(node):
                    values[inner] = graph.node_copy(inner, values.__getitem__)
                if inner.op == "get_attr":
                    values[inner].target = f"{region.target}.{inner.target}"
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not region.users:
            graph.erase_node(region)


def flat_signature(exported: fx.GraphModule) -> fx.GraphModule:
    """The graph with one tensor in and a tensor or a flat tuple out, in place of torch.export's pytrees."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != 1:
        raise UsageError(
            f"The model takes {len(placeholders)} inputs; zsq needs a model of one image tensor."
        )
    result: Any = None
    for node in exported.graph.nodes:
        if node.op == "output":
            leaves = [leaf for leaf in pytree.tree_leaves(node.args[0]) if leaf is not None]
            mapped = [values[leaf] for leaf in leaves if isinstance(leaf, fx.Node)]
            if not mapped:
                raise UsageError("The model returns no tensor.")
            result = mapped[0] if len(mapped) == 1 else tuple(mapped)
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    graph.output(result)
    graph.set_codegen(CodeGen())
    return fx.GraphModule(exported, graph, "Captured")


def remove_in_place(graph_module: fx.GraphModule) -> None:
    """Turn `add_`, `relu_` into `add`, `relu`; later readers of the overwritten tensor read the result."""
    graph = graph_module.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target: Any = node.target
        if not writes_in_place(node) or not target._schema.name.endswith("_"):
            continue
        packet = getattr(aten, target._schema.name.split("::")[1][:-1], None)
        overload = getattr(packet, target._overloadname, None)
        overwritten = node.args[0]
        if overload is None or not isinstance(overwritten, fx.Node):
            raise UsageError(
                f"The model writes in place with {target}, which zsq cannot turn into a pure operation."
            )
        node.target = overload
        for user in list(overwritten.users):
            if order[user] > order[node]:
                user.replace_input_with(overwritten, node)


def remove_identities(graph_module: fx.GraphModule) -> None:
    """Remove dropout and the like, which return the very tensor that a later write in place may mean."""
    for node in list(graph_module.graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, fx.Node):
            continue
        if _returns(node, source):
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)


def _returns(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operation returns the very tensor that it reads."""
    result, value = node.meta.get("val"), source.meta.get("val")
    if node.target in IDENTITIES or not (isinstance(result, Tensor) and isinstance(value, Tensor)):
        return node.target in IDENTITIES
    if node.target in CASTS:
        return (result.dtype, result.device) == (value.dtype, value.device)
    return node.target is aten.slice.Tensor and str(result.shape) == str(value.shape)


def accept_any_strides(graph_module: fx.GraphModule) -> None:
    """`reshape` for `view`: the same values, and it takes channels-last tensors too."""
    for node in graph_module.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default


def remove_unused(graph_module: fx.GraphModule) -> None:
    """Remove what nothing reads, also assertions on metadata, which fx keeps."""
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph_module.graph.erase_node(node)
