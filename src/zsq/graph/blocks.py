"""Split a captured network into reconstruction units, from its graph alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

import torch
from torch import fx

from zsq.graph.nodes import activations, aten, layer_name, module_path, output_nodes, weight_node

MAX_LAYERS = 8  # weighted layers in a unit before it is split at places where several tensors are live
MAX_MERGED = 5  # weighted layers that a unit merged from neighbouring ones may have


@dataclass(frozen=True)
class Unit:
    """A piece of the network that is reconstructed as a whole.

    Attributes:
        name: dotted name of the module that holds its layers, made unique.
        inputs: names of the graph nodes it reads, in graph order; usually one.
        outputs: names of the nodes it computes for others (or for the caller), in graph order; usually one.
        nodes: names of all its activation nodes, in graph order.
        layers: names of the convolutions and linear layers in it, as nodes of the graph.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class _Segment:
    """Nodes start..end (exclusive) of the list of activations, and how many of them are layers."""

    start: int
    end: int
    layers: int

    def joined(self, other: "_Segment") -> "_Segment":
        return _Segment(self.start, other.end, self.layers + other.layers)


def split(graph: fx.Graph, *, max_layers: int = MAX_LAYERS, max_merged: int = MAX_MERGED) -> tuple[Unit, ...]:
    """Cut the graph into units that tile it: every activation node is in exactly one, in order.

    1. Cut wherever exactly one activation tensor is live (a residual block stays whole).
    2. Operations without weights join the unit before them while they keep the tensor's shape (BatchNorm,
       ReLU), else the one after them (pad, pool, flatten); the module that wrote them decides first.
    3. Neighbouring single layers under one named module become one unit (depthwise + pointwise).
    4. A unit of more than `max_layers` layers (dense blocks, detector necks) is cut where fewest tensors are
       live.

    Raises:
        ValueError: the graph has no convolution or linear layer.
    """
    nodes = activations(graph)
    weighted = [weight_node(n) is not None for n in nodes]
    if not any(weighted):
        raise ValueError("the graph has no convolution or linear layer with a weight")
    live = _live_after(nodes)
    segments = _single_tensor_segments(nodes, weighted, live)
    segments = _attach_weightless(nodes, segments)
    segments = _merge_single_layers(nodes, weighted, segments, max_merged)
    segments = [part for s in segments for part in _cap(s, weighted, live, nodes, max_layers)]
    return _units(graph, nodes, segments)


def extract(graph_module: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> fx.GraphModule:
    """The part of a graph between named nodes, as a callable module that shares all tensors and submodules.

    Args:
        graph_module: a captured network, with or without quantizers; left as it is.
        inputs: names of the nodes that become its arguments, in this order.
        outputs: names of the nodes that it returns, always as a tuple.

    Raises:
        ValueError: the outputs are computed from more than the inputs.
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    by_name = {node.name: node for node in graph_module.graph.nodes}
    for name in inputs:
        values[by_name[name]] = graph.placeholder(name)
        values[by_name[name]].meta = dict(by_name[name].meta)
    wanted = _needed({by_name[name] for name in outputs}, stop=set(values))
    for node in graph_module.graph.nodes:
        if node not in wanted or node in values:
            continue
        if node.op == "placeholder":
            raise ValueError(f"{', '.join(outputs)} are not computed from {', '.join(inputs)} alone")
        if node.target is aten.sym_size.int and node.args[0] not in wanted:
            size = str(node.meta.get("val", ""))
            same = [by_name[i] for i in inputs if _leading_size(by_name[i]) == size]
            if not same:
                raise ValueError(f"no input of this part has the size that {node.name} asks for")
            values[node] = graph.call_function(aten.sym_size.int, (values[same[0]], 0))
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
        values[node].meta = dict(node.meta)
    graph.output(tuple(values[by_name[name]] for name in outputs))
    graph.lint()
    return fx.GraphModule(graph_module, graph, "Part")


def _needed(outputs: set[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Everything that `outputs` are computed from, up to `stop`; batch sizes are asked of the inputs."""
    found = set(stop)
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if node.target is not aten.sym_size.int:
                pending.extend(node.all_input_nodes)
    return found


def _leading_size(node: fx.Node) -> str:
    """The first dimension of a tensor as torch.export writes it: "s77", "4*s77", "3"; "" if it has none."""
    value = node.meta.get("val")
    return str(value.shape[0]) if isinstance(value, torch.Tensor) and value.ndim > 0 else ""


def _live_after(nodes: list[fx.Node]) -> list[list[int]]:
    """For every position, the positions of the tensors computed up to it that are read later."""
    position = {node: i for i, node in enumerate(nodes)}
    last = [max([i, *(position[u] for u in _readers(n) if u in position)]) for i, n in enumerate(nodes)]
    live: list[list[int]] = []
    alive: list[int] = []
    for i in range(len(nodes)):
        alive = [j for j in (*alive, i) if last[j] > i]
        live.append(alive)
    return live


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users of a node, looking through what reads only its sizes."""
    return [user for user in node.users if user.target is not aten.sym_size.int]


def _single_tensor_segments(
    nodes: list[fx.Node], weighted: list[bool], live: list[list[int]]
) -> list[_Segment]:
    batch = _leading_size(nodes[0])
    segments, start = [], 1  # node 0 is the image
    for i in range(1, len(nodes)):
        single = live[i] == [i] and _leading_size(nodes[i]) == batch
        if single or i == len(nodes) - 1:
            segments.append(_Segment(start, i + 1, sum(weighted[start : i + 1])))
            start = i + 1
    return segments


def _shared_depth(a: str, b: str) -> int:
    """Number of leading parts that two dotted names share."""
    return len(commonprefix([a.split("."), b.split(".")])) if a and b else 0


def _segment_path(nodes: list[fx.Node], segment: _Segment) -> str:
    """Common prefix of the modules of a segment's layers (of all its nodes if it has no layer)."""
    members = nodes[segment.start : segment.end]
    names = [layer_name(n) for n in members if weight_node(n) is not None] or [
        module_path(n) for n in members
    ]
    return ".".join(commonprefix([name.split(".") for name in names]))


def _attach_weightless(nodes: list[fx.Node], segments: list[_Segment]) -> list[_Segment]:
    result: list[_Segment] = []
    pending: list[_Segment] = []  # weightless, to join the next unit
    for index, segment in enumerate(segments):
        if segment.layers:
            for waiting in reversed(pending):
                segment = waiting.joined(segment)
            pending = []
            result.append(segment)
            continue
        following = next((s for s in segments[index:] if s.layers), None)
        if not result:
            pending.append(segment)
        elif following is None:
            result[-1] = result[-1].joined(segment)
        elif pending:
            pending.append(segment)
        else:
            path = _segment_path(nodes, segment)
            before = _shared_depth(path, layer_name(_last_layer(nodes, result[-1])))
            after = _shared_depth(path, _segment_path(nodes, following))
            keeps = _shape(nodes[segment.end - 1]) == _shape(nodes[result[-1].end - 1])
            if after > before or (after == before and not keeps):
                pending.append(segment)
            else:
                result[-1] = result[-1].joined(segment)
    return result


def _last_layer(nodes: list[fx.Node], segment: _Segment) -> fx.Node:
    return [n for n in nodes[segment.start : segment.end] if weight_node(n) is not None][-1]


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(d) for d in getattr(node.meta.get("val"), "shape", ()))


def _merge_single_layers(
    nodes: list[fx.Node], weighted: list[bool], segments: list[_Segment], max_merged: int
) -> list[_Segment]:
    """Join runs of neighbours under the innermost named module that holds more than one of them.

    A run is joined when it has at most `max_merged` layers and at most one member had several already.
    """
    paths = [_segment_path(nodes, s) for s in segments]
    if len(segments) < 2:
        return segments
    ancestors = {".".join(p.split(".")[:k]) for p in paths if p for k in range(1, p.count(".") + 2)}
    for ancestor in sorted(ancestors, key=lambda a: (-a.count("."), a)):
        inside = [i for i, p in enumerate(paths) if p == ancestor or p.startswith(ancestor + ".")]
        if len(inside) < 2 or inside != list(range(inside[0], inside[-1] + 1)):
            continue
        run = [segments[i] for i in inside]
        if sum(s.layers for s in run) > max_merged or sum(s.layers > 1 for s in run) > 1:
            continue
        merged = run[0]
        for other in run[1:]:
            merged = merged.joined(other)
        segments = [*segments[: inside[0]], merged, *segments[inside[-1] + 1 :]]
        paths = [*paths[: inside[0]], ancestor, *paths[inside[-1] + 1 :]]
    return segments


def _cap(
    segment: _Segment, weighted: list[bool], live: list[list[int]], nodes: list[fx.Node], max_layers: int
) -> list[_Segment]:
    if segment.layers <= max_layers:
        return [segment]
    batch = _leading_size(nodes[0])
    candidates: list[tuple[int, int, int]] = []  # (live tensors, -layers, end)
    layers = 0
    for i in range(segment.start, segment.end - 1):
        layers += weighted[i]
        if candidates and layers > max(max_layers, -candidates[-1][1]):
            break
        if layers and all(_leading_size(nodes[j]) == batch for j in live[i]):
            short = layers * 2 < max_layers
            candidates.append((len(live[i]) + 100 * short, -layers, i + 1))
    if not candidates:
        return [segment]
    best = min(c[:2] for c in candidates)
    end = max(c[2] for c in candidates if c[:2] == best)  # the last of equals: after BatchNorm and ReLU
    done = -best[1]
    head = replace(segment, end=end, layers=done)
    return [
        head,
        *_cap(replace(segment, start=end, layers=segment.layers - done), weighted, live, nodes, max_layers),
    ]


def _units(graph: fx.Graph, nodes: list[fx.Node], segments: list[_Segment]) -> tuple[Unit, ...]:
    position = {node: i for i, node in enumerate(nodes)}
    returned = set(output_nodes(graph))
    units, taken = [], set()
    for segment in segments:
        members = nodes[segment.start : segment.end]
        inside = set(members)
        reads = {a for n in members for a in n.all_input_nodes if a in position and a not in inside}
        writes = [
            n for n in members if n in returned or any(u in position and u not in inside for u in _readers(n))
        ]
        layers = [n for n in members if weight_node(n) is not None]
        base = name = _segment_path(nodes, segment) or layer_name(layers[0])
        count = 1
        while name in taken:
            count += 1
            name = f"{base}#{count}"
        taken.add(name)
        units.append(
            Unit(
                name=name,
                inputs=tuple(n.name for n in sorted(reads, key=position.__getitem__)),
                outputs=tuple(n.name for n in writes),
                nodes=tuple(n.name for n in members),
                layers=tuple(n.name for n in layers),
            )
        )
    return tuple(units)


def last_readers(units: Sequence[Unit]) -> dict[str, int]:
    """For every tensor between units, the index of the last unit that reads it."""
    return {name: index for index, unit in enumerate(units) for name in unit.inputs}
