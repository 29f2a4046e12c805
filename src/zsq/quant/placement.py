"""Which tensors of a captured graph a scheme quantizes, and to how many bits."""

from dataclasses import dataclass, field

import torch
from torch import fx

from zsq.graph.attention import operands, softmax_before
from zsq.graph.nodes import MOVES, activations, aten, weight_node
from zsq.quant.scheme import Scheme

ADDITIONS = frozenset({aten.add.Tensor, aten.sub.Tensor})
# Normalisations by statistics of the tensor itself, unlike BatchNorm's stored ones.
NORMS = frozenset({aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default})


@dataclass(frozen=True)
class Placement:
    """Where quantizers sit, by node name.

    Attributes:
        weights: bits of every weighted layer.
        activations: bits of every quantized tensor.
        readers: for every quantized tensor, the nodes that read it through its quantizer.
        shared: quantized tensor -> the earlier one whose quantizer it has, where it has none of its own.
        logarithmic: quantized tensors whose logarithm is rounded.
    """

    weights: dict[str, int]
    activations: dict[str, int]
    readers: dict[str, tuple[str, ...]]
    shared: dict[str, str] = field(default_factory=dict)
    logarithmic: frozenset[str] = frozenset()


def place(graph: fx.Graph, scheme: Scheme) -> Placement:
    """Decide from the graph which tensors are quantized, and to how many bits.

    Quantized are the weights and the input of every convolution and linear layer but the first one's input
    (the image), both operands of matrix products of activations (queries, keys, values and softmax weights of
    attention; not of products that something is divided by, see `operands`), and identity shortcuts: operands
    of an addition that another operand is computed from through a layer, but for the stream of a network
    whose blocks normalise what they read from it (see `Scheme.residual_stream`). All such readers of one
    tensor share its quantizer, also through slices, pads and reshapes; where they want different bits, the
    larger number holds.

    With ends="8bit", 8 bits go to: weights of layers that no layer precedes, weights and input of layers that
    no layer follows, and tensors that only first layers precede (the second layer's input; BRECQ's
    convention).

    Source: BRECQ and Genie (arXiv:2212.04780) as in their code; the sharing rule is Genie's.
    """
    nodes = activations(graph)
    layers = [n for n in nodes if weight_node(n) is not None]
    depth = layer_depths(nodes)
    last = {n for n in layers if not leads_to_layer(n)}
    eight_bit_ends = scheme.ends == "8bit"
    weights = {
        n.name: 8 if eight_bit_ends and (depth[n] == 1 or n in last) else scheme.weight_bits for n in layers
    }
    wanted: dict[fx.Node, int] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    logarithmic: set[str] = set()

    def read(tensor: fx.Node, reader: fx.Node, bits: int) -> fx.Node | None:
        source, reader = through_moves(tensor, reader)
        if depth[source] == 0:  # the image
            return None
        if eight_bit_ends and depth[source] == 1:
            bits = 8
        wanted[source] = max(wanted.get(source, 0), bits)
        if reader not in readers.setdefault(source, []):
            readers[source].append(reader)
        return source

    if scheme.activation_bits is not None:
        for layer in layers:
            source = layer.args[0]
            assert isinstance(source, fx.Node)
            read(source, layer, 8 if eight_bit_ends and layer in last else scheme.activation_bits)
        for node in nodes:
            factors = operands(node)
            if all(factor in depth for factor in factors):
                found = [read(factor, node, scheme.activation_bits) for factor in factors]
                if scheme.softmax == "log2" and softmax_before(node) is not None and found[0] is not None:
                    logarithmic.add(found[0].name)
        for node, operand in _identity_shortcuts(nodes):
            if scheme.residual_stream == "quantized" or not _read_through_norms(operand, node):
                read(operand, node, scheme.activation_bits)
    return Placement(
        weights=weights,
        activations={n.name: wanted[n] for n in nodes if n in wanted},
        readers={n.name: tuple(r.name for r in readers[n]) for n in nodes if n in wanted},
        logarithmic=frozenset(logarithmic),
    )


def layer_depths(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """For every tensor, the largest number of layers on a path from the images to it (its own included)."""
    depth: dict[fx.Node, int] = {}
    for node in nodes:
        before = max((depth[a] for a in node.all_input_nodes if a in depth), default=0)
        depth[node] = before + (weight_node(node) is not None)
    return depth


def leads_to_layer(node: fx.Node) -> bool:
    """Whether a convolution or linear layer is computed from this node."""
    seen, pending = {node}, list(node.users)
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        if weight_node(user) is not None:
            return True
        seen.add(user)
        pending.extend(user.users)
    return False


def through_moves(tensor: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Go back over operations that only move values and serve this reader alone."""
    while (
        tensor.op == "call_function"
        and tensor.target in MOVES
        and len(tensor.users) == 1
        and zero_padded(tensor)
    ):
        source = tensor.args[0]
        if not isinstance(source, fx.Node):
            break
        tensor, reader = source, tensor
    return tensor, reader


def zero_padded(node: fx.Node) -> bool:
    """Whether a move adds no other values than zeros."""
    if node.target is aten.pad.default:
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        return mode != "constant" or value in (None, 0, 0.0)
    if node.target is aten.constant_pad_nd.default:
        return len(node.args) < 3 or node.args[2] in (0, 0.0)
    return True


def _identity_shortcuts(nodes: list[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs (addition, operand) in which another operand depends on the operand's tensor through a layer.

    Operands that do not depend on the images (the first state of a class token) are none.
    """
    found, varying = [], set(nodes)
    for node in nodes:
        if node.target not in ADDITIONS:
            continue
        operands = [
            a for a in node.args[:2] if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.Tensor)
        ]
        if len(operands) != 2:
            continue
        for operand, other in (operands, operands[::-1]):
            source, _ = through_moves(operand, node)
            if source in varying and operand is not other and _depends_through_layer(other, source):
                found.append((node, operand))
    return found


def _read_through_norms(operand: fx.Node, addition: fx.Node) -> bool:
    """Whether normalisations read a shortcut's tensor, and no layer does."""
    source, _ = through_moves(operand, addition)
    return any(user.target in NORMS for user in source.users) and not any(
        weight_node(user) is not None for user in source.users
    )


def _depends_through_layer(node: fx.Node, ancestor: fx.Node) -> bool:
    seen: set[tuple[fx.Node, bool]] = set()
    pending = [(node, False)]
    while pending:
        current, passed = pending.pop()
        if current is ancestor:
            if passed:
                return True
            continue
        passed = passed or weight_node(current) is not None
        for source in current.all_input_nodes:
            if (source, passed) not in seen:
                seen.add((source, passed))
                pending.append((source, passed))
    return False
