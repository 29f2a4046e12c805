"""Attention in the graph, whoever wrote it: matrix products of activations, softmax between two of them."""

import operator
from typing import Any

from torch import fx

from zsq.graph.nodes import MOVES, aten

PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.einsum.default})
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})
FUSED_ATTENTION = aten.scaled_dot_product_attention.default
# What may stand between a softmax and the product that it weighs: other shapes and layouts, same values.
_RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.expand.default,
        aten.contiguous.default,
        aten.clone.default,
    }
)


# Operations through which a product reaches what it divides.
_PARTS = MOVES | {
    aten.expand.default,
    aten.select.int,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    operator.getitem,
    aten.add.Tensor,
    aten.clamp_min.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
}


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that an attention multiplies: of a product (or einsum) two, of a fused attention three.

    Constants count; an empty tuple for any other node, and for products that something is divided by, such as
    the normalisation of linear attention (EfficientViT, arXiv:2205.14756): a divisor that is rounded to 0
    makes the quotient as large as it likes. Like softmax, it is left in float.
    """
    if _divides(node):
        return ()
    if node.target is aten.einsum.default:
        return tuple(node.args[1]) if len(node.args[1]) == 2 else ()  # type: ignore[arg-type]
    count = 2 if node.target in PRODUCTS else 3 if node.target is FUSED_ATTENTION else 0
    return tuple(a for a in node.args[:count] if isinstance(a, fx.Node))


def _divides(node: fx.Node) -> bool:
    """Whether a division by a product, or by parts of it, follows, through other products at most."""
    pending, seen = [node] if node.target in PRODUCTS else [], {node}
    while pending:
        current = pending.pop()
        for user in current.users:
            quotient = user.target is aten.div.Tensor and user.args[1] is current
            if quotient or user.target is aten.reciprocal.default:
                return True
            if user not in seen and (user.target in PRODUCTS or _is_part(user)):
                seen.add(user)
                pending.append(user)
    return False


def _is_part(node: fx.Node) -> bool:
    """Whether an operation moves, adds up or bounds what it reads; of additions, those of a number."""
    return node.target in _PARTS and not (
        node.target is aten.add.Tensor and all(isinstance(term, fx.Node) for term in node.args[:2])
    )


def attentions(graph: fx.Graph) -> list[fx.Node]:
    """What attention returns, in order: products whose first operand a softmax gives, (..., T, D)."""
    return [n for n in graph.nodes if n.target is FUSED_ATTENTION or softmax_before(n) is not None]


def softmax_before(product: fx.Node) -> fx.Node | None:
    """The softmax that gives the first operand of a matrix product; None if another operation does.

    None for einsum too, whose result may have its axes in any order.
    """
    if product.target not in PRODUCTS:
        return None
    node: Any = product.args[0]
    while isinstance(node, fx.Node) and node.target in _RESHAPES:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.target in SOFTMAXES else None


def write_out_attention(graph: fx.Graph) -> None:
    """Put softmax(q k^T scale + mask) v, operation by operation, in the place of fused attention; in place.

    So that what the softmax returns is a tensor of the graph. Causal and grouped attention, and masks of
    truth values, stay as they are.

    Args:
        graph: of torch.export, with `meta["val"]`.
    """
    for node in list(graph.nodes):
        if node.target is not FUSED_ATTENTION:
            continue
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
        mask = given.get("attn_mask")
        if given.get("is_causal") or given.get("enable_gqa"):
            continue
        if mask is not None and not mask.meta["val"].is_floating_point():
            continue
        query, key = given["query"], given["key"]
        scale = given.get("scale")
        if scale is None:
            scale = int(query.meta["val"].shape[-1]) ** -0.5
        with graph.inserting_before(node):
            found = _call(graph, node, aten.transpose.int, key, -2, -1)
            found = _call(graph, node, aten.matmul.default, query, found)
            found = _call(graph, node, aten.mul.Tensor, found, scale)
            if mask is not None:
                found = _call(graph, node, aten.add.Tensor, found, mask)
            found = _call(graph, node, aten.softmax.int, found, -1)
            found = _call(graph, node, aten.matmul.default, found, given["value"])
        node.replace_all_uses_with(found)
        graph.erase_node(node)


def _call(graph: fx.Graph, origin: fx.Node, operation: Any, *args: Any) -> fx.Node:
    """A new node with the shape of its value and the module that wrote `origin`."""
    found = graph.call_function(operation, args)
    value = operation(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    found.meta = {**origin.meta, "val": value}
    return found
