"""Where quantizers sit so that an engine computes a network in integers."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from zsq.graph.attention import operands as factors
from zsq.graph.fold import BATCH_NORM, foldable
from zsq.graph.nodes import MOVES, activations, aten, output_nodes, weight_node
from zsq.quant.placement import Placement, layer_depths, leads_to_layer, zero_padded
from zsq.quant.scheme import Scheme

# Operations whose result holds values of their input and no others: it needs no quantizer of its own.
CARRIERS = MOVES | {
    aten.max_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.select.int,
    aten.expand.default,
    aten.pixel_shuffle.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    operator.getitem,
}
# Operations that engines compute with the layer or addition before them, when its result is rounded.
FUSED = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
    }
)
POOLS = frozenset({aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default})
CAT = aten.cat.default
IMAGE_BITS = 8  # images come as 8-bit pixels, whatever the scheme


def place_for_engine(graph: fx.Graph, scheme: Scheme) -> Placement:
    """Decide from the graph which tensors are quantized so that layers and additions read and give codes.

    Quantized are the weights and what `place` quantizes, and besides

    * what the first layer reads (the image), with 8 bits: it comes as 8-bit pixels,
    * what every layer and every addition of two tensors returns, after the BatchNorm that folds into the
      layer and the ReLU or clip that engines fuse, unless the network returns it (through moves at most),
    * both operands of such an addition, and operands and result of a matrix product of activations,
    * what local average pools read and return.

    Max pools, nearest upsampling, slices and reshapes carry codes on. The operands and the result of a
    concatenation share one quantizer, and so do the input and the result of a local average pool; a global
    average has its own, since its values lie in a small part of its input's range. Everything that reads a
    quantized tensor reads it quantized, but for the network's output.

    The added quantizers have the scheme's bits. With ends="8bit", 8 bits go where `place` puts them: inputs
    of layers that no layer follows, and tensors that only first layers precede. Of the bits that the tensors
    of a shared quantizer want, the largest number holds.
    """
    return _Placing(graph, scheme).placement()


class _Placing:
    """A placement in the making.

    Attributes:
        wanted: bits of tensors that get quantizers.
        leader: tensor -> another one of its group, the tensor itself at the group's end.
    """

    def __init__(self, graph: fx.Graph, scheme: Scheme) -> None:
        assert scheme.activation_bits is not None
        self.scheme, self.bits = scheme, scheme.activation_bits
        self.nodes = activations(graph)
        self.known = set(self.nodes)
        self.returned = set(output_nodes(graph))
        self.depth = layer_depths(self.nodes)
        self.wanted: dict[fx.Node, int] = {}
        self.leader: dict[fx.Node, fx.Node] = {}

    def placement(self) -> Placement:
        layers = [n for n in self.nodes if weight_node(n) is not None]
        eight_bit_ends = self.scheme.ends == "8bit"
        last = {n for n in layers if not leads_to_layer(n)}
        for node in self.nodes:
            if node in layers:
                self.want(node.args[0], 8 if eight_bit_ends and node in last else self.bits)
            for operand in self.operands(node):
                self.want(operand, self.bits)
            if node.target is CAT and self.is_read(node):
                self.want(node, self.bits)
            if node in layers or self.operands(node):
                end = _end_of_fused(node)
                if self.is_read(end):
                    self.want(end, self.bits)
        self.join_pools()
        return Placement(
            weights={
                n.name: 8 if eight_bit_ends and (self.depth[n] == 1 or n in last) else self.scheme.weight_bits
                for n in layers
            },
            **self.tables(),
        )

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Of an addition of two tensors that depend on the images, or of their matrix product."""
        multiplied = factors(node)
        if multiplied:
            return list(multiplied) if all(a in self.known for a in multiplied) else []
        if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1:
            return []
        found = [a for a in node.args[:2] if isinstance(a, fx.Node) and a in self.known]
        return found if len(found) == 2 else []

    def want(self, tensor: Any, bits: int) -> None:
        """Quantize where the values of a tensor come from."""
        assert isinstance(tensor, fx.Node)
        sources = list(dict.fromkeys(self.sources(tensor)))
        for source in sources:
            second = self.scheme.ends == "8bit" and self.depth[source] == 1
            own = IMAGE_BITS if self.depth[source] == 0 else 8 if second else bits
            self.wanted[source] = max(self.wanted.get(source, 0), own)
            self.join(source, sources[0])

    def sources(self, tensor: fx.Node) -> Iterator[fx.Node]:
        """The tensors that the values of `tensor` come from, unchanged."""
        parts = self.carried(tensor)
        if not parts:
            yield tensor
        for part in parts:
            yield from self.sources(part)

    def carried(self, node: fx.Node) -> list[fx.Node]:
        """What an operation takes its values from; nothing if it makes values of its own."""
        if node.target is CAT:
            parts: Any = node.args[0]
            return list(parts) if all(part in self.known for part in parts) else []
        if node.op != "call_function" or node.target not in CARRIERS or not zero_padded(node):
            return []
        source = node.args[0]
        return [source] if isinstance(source, fx.Node) and source in self.known else []

    def is_read(self, tensor: fx.Node) -> bool:
        """Whether more than the network's output reads a tensor; what carries its values does not count."""
        readers = [user for user in tensor.users if user in self.known]
        return any(not self.carried(user) or self.is_read(user) for user in readers)

    def join_pools(self) -> None:
        """Local average pools between quantized tensors share a quantizer with what they read."""
        for node in self.nodes:
            if node.target in POOLS and node in self.wanted and max(_map_size(node)) > 1:
                self.want(node.args[0], self.wanted[node])
                self.join(next(self.sources(node.args[0])), node)  # type: ignore[arg-type]

    def join(self, tensor: fx.Node, other: fx.Node) -> None:
        """Put two tensors in one group."""
        self.leader[self.group(tensor)] = self.group(other)

    def group(self, tensor: fx.Node) -> fx.Node:
        """The tensor that stands for the group of a tensor."""
        while self.leader.setdefault(tensor, tensor) is not tensor:
            tensor = self.leader[tensor]
        return tensor

    def tables(self) -> dict[str, Any]:
        """Activations, readers and shared quantizers of the placement."""
        groups: dict[fx.Node, list[fx.Node]] = {}
        for tensor in (n for n in self.nodes if n in self.wanted):
            groups.setdefault(self.group(tensor), []).append(tensor)
        bits: dict[str, int] = {}
        shared: dict[str, str] = {}
        for first, *others in groups.values():
            most = max(self.wanted[tensor] for tensor in (first, *others))
            bits |= {tensor.name: most for tensor in (first, *others)}
            shared |= {tensor.name: first.name for tensor in others}
        kept = [n for n in self.nodes if n in self.wanted]
        readers = {n.name: tuple(u.name for u in n.users if u in self.known) for n in kept}
        return {"activations": {n.name: bits[n.name] for n in kept}, "readers": readers, "shared": shared}


def _end_of_fused(node: fx.Node) -> fx.Node:
    """The last of the operations after a layer or addition that engines compute with it."""
    if len(node.users) == 1:
        (user,) = node.users
        if user.target is BATCH_NORM and user.args[0] is node and foldable(node, user):
            return _end_of_fused_activation(user)
    return _end_of_fused_activation(node)


def _end_of_fused_activation(node: fx.Node) -> fx.Node:
    if len(node.users) == 1:
        (user,) = node.users
        if user.target in FUSED and user.args[0] is node:
            return user
    return node


def _map_size(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape[2:]) if isinstance(value, torch.Tensor) else ()
