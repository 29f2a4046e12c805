"""Where a student's bits are over the graph: rows in order of computation, joined by lanes."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from zsq.graph.nodes import LAYERS, aten
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer

ROW, LANE, WIDEST = 30, 14, 168  # pixels: height of a row, distance of lanes, all lanes at most

Stroke = tuple[float, float, float, float]  # lane and height where a line starts, and where it ends


@dataclass(frozen=True)
class Step:
    """A row: the image, a layer with a weight, or an operation that joins several tensors.

    Attributes:
        name: of the layer, or of the operation.
        operation: what it computes, in words.
        weights: how many weights it has; 0 for none.
        weight_bits: None for weights in float, or if it has none.
        activation_bits: of its inputs, one for each way it reads; None for float.
        quantizers: names of the activation quantizers that it reads.
        weight_quantizer: name of the quantizer of its weight; "" if there is none.
        rail: SVG of the lanes beside it.
    """

    name: str
    operation: str
    weights: int
    weight_bits: int | None
    activation_bits: tuple[int | None, ...]
    quantizers: tuple[str, ...]
    weight_quantizer: str
    rail: str


@dataclass
class _Draft:
    node: fx.Node
    name: str
    operation: str
    sources: list[int]
    readers: int = -1  # the last row that reads it
    weight: WeightQuantizer | None = None
    weight_name: str = ""
    weights: int = 0
    activations: tuple[tuple[int | None, str], ...] = ()


def placement(student: fx.GraphModule) -> list[Step]:
    """The rows of a student, in order of its graph.

    Operations without weights that read one tensor (ReLU, BatchNorm, pooling) belong to the row before.
    """
    drafts = _drafts(student)
    for index, draft in enumerate(drafts):
        for source in draft.sources:
            drafts[source].readers = max(drafts[source].readers, index)
    rails = _rails(drafts)
    return [
        Step(
            name=d.name,
            operation=d.operation,
            weights=d.weights,
            weight_bits=None if d.weight is None else d.weight.bits,
            activation_bits=tuple(dict.fromkeys(bits for bits, _ in d.activations)),
            quantizers=tuple(name for _, name in d.activations if name),
            weight_quantizer=d.weight_name,
            rail=rail,
        )
        for d, rail in zip(drafts, rails, strict=True)
    ]


def _drafts(student: fx.GraphModule) -> list[_Draft]:
    rows: list[_Draft] = []
    origins: dict[
        fx.Node, list[int]
    ] = {}  # rows that a node's value comes from; none for constants and sizes
    modules = dict(student.named_modules())
    for node in student.graph.nodes:
        if node.op == "output":
            continue
        before = list(dict.fromkeys(row for a in node.all_input_nodes for row in origins.get(a, ())))
        if node.op == "placeholder":
            rows.append(_Draft(node, "image", "input", []))
            origins[node] = [0]
        elif node.target is aten.sym_size.int or _is_arithmetic(node) or not before:
            origins[node] = []
        elif node.target in LAYERS or len(before) > 1:
            rows.append(_row(node, before, modules))
            origins[node] = [len(rows) - 1]
        else:
            origins[node] = before
    return rows


def _is_arithmetic(node: fx.Node) -> bool:
    """On sizes: operators of Python but for taking one of several tensors."""
    return getattr(node.target, "__module__", "") == "_operator" and node.target is not operator.getitem


def _row(node: fx.Node, before: list[int], modules: dict[str, Any]) -> _Draft:
    kind = str(node.target).split(".")[1] if "." in str(node.target) else node.name
    quantized: list[tuple[int | None, str]] = []
    for source in node.all_input_nodes:
        module = modules.get(str(source.target)) if source.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            quantized.append((module.bits, str(source.target)))
        elif not isinstance(module, WeightQuantizer) and source.op != "get_attr":
            quantized.append((None, ""))
    draft = _Draft(node, kind.replace("_", " "), "joins tensors", before, activations=tuple(quantized))
    if node.target in LAYERS and isinstance(node.args[1], fx.Node):
        weight = node.args[1]
        draft.weight = modules.get(str(weight.target)) if weight.op == "call_module" else None
        draft.weight_name = str(weight.target) if draft.weight is not None else ""
        name = draft.weight_name.removesuffix("_again").removesuffix("_quantizer") or str(weight.target)
        draft.name = name.rpartition(".")[0] or name
        if draft.weight is not None:
            shape = list(draft.weight.codes.shape)
            draft.weights = math.prod(shape)
            draft.operation = _in_words(kind, shape, node)
        else:
            draft.operation = kind
    return draft


def _in_words(kind: str, shape: Sequence[int], node: fx.Node) -> str:
    """conv2d of (32, 16, 3, 3) -> "conv 3×3, 16 → 32"."""
    if len(shape) < 3:
        return f"linear, {shape[1]} → {shape[0]}"
    swapped = "transpose" in kind
    outputs, inputs = (shape[1], shape[0]) if swapped else (shape[0], shape[1])
    groups = node.args[8 if swapped else 6] if len(node.args) > (8 if swapped else 6) else 1
    many = int(groups) if isinstance(groups, int) else 1
    inputs, outputs = (inputs, outputs * many) if swapped else (inputs * many, outputs)
    kernel = "×".join(map(str, shape[2:]))
    strides = node.args[3] if len(node.args) > 3 and isinstance(node.args[3], (list, tuple)) else [1]
    parts = [f"{'transposed conv' if swapped else 'conv'} {kernel}, {inputs} → {outputs}"]
    if any(s != 1 for s in strides):
        parts.append(f"stride {strides[0]}")
    if many > 1:
        parts.append("depthwise" if many == inputs else f"{many} groups")
    return ", ".join(parts)


def _rails(drafts: Sequence[_Draft]) -> list[str]:
    """Lanes beside each row: a tensor keeps a lane from the row that makes it to the last that reads it."""
    lanes: list[int | None] = []
    drawn: list[tuple[list[Stroke], int]] = []
    for index, draft in enumerate(drafts):
        above = list(lanes)
        for lane, source in enumerate(lanes):
            if source is not None and drafts[source].readers <= index:
                lanes[lane] = None
        ending = [k for k, source in enumerate(above) if source in draft.sources and lanes[k] is None]
        column = min(ending) if ending else next((k for k, s in enumerate(lanes) if s is None), len(lanes))
        lines: list[Stroke] = [
            (k, 0.0, k, 1.0) for k, source in enumerate(above) if source is not None and lanes[k] == source
        ]
        lines += [(k, 0.0, column, 0.5) for k, source in enumerate(above) if source in draft.sources]
        if draft.readers > index:
            lanes += [None] * (column + 1 - len(lanes))
            lanes[column] = index
            lines.append((column, 0.5, column, 1.0))
        drawn.append((lines, column))
    count = max((max([c, *(max(a, b) for a, _, b, _ in lines)]) for lines, c in drawn), default=0) + 1
    pitch = min(LANE, WIDEST / count)
    width = round(pitch * count)

    def at(lane: float) -> str:
        return f"{(lane + 0.5) * pitch:.1f}"

    rails = []
    for lines, column in drawn:
        body = []
        for a, top, b, bottom in lines:
            y1, y2 = round(top * ROW, 1), round(bottom * ROW, 1)
            half = (y1 + y2) / 2
            path = (
                f"M{at(a)} {y1}C{at(a)} {half} {at(b)} {half} {at(b)} {y2}"
                if a != b
                else (f"M{at(a)} {y1}V{y2}")
            )
            body.append(f'<path d="{path}"/>')
        body.append(f'<circle cx="{at(column)}" cy="{ROW / 2}" r="{min(4.5, pitch / 2):.1f}"/>')
        rails.append(
            f'<svg class="rail" width="{width}" height="{ROW}" viewBox="0 0 {width} {ROW}" '
            f'aria-hidden="true">{"".join(body)}</svg>'
        )
    return rails
