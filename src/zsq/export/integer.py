"""A student that an engine is to compute in integers: where its codes go, and what became of it there."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from zsq.errors import import_extra
from zsq.export.builder import EXTRA
from zsq.export.engine import EngineModel, SessionOptions
from zsq.graph.nodes import aten
from zsq.quant.engine_placement import CARRIERS, CAT, FUSED
from zsq.quant.placement import zero_padded
from zsq.quant.quantizers import ActivationQuantizer


def reads_codes(student: fx.GraphModule) -> bool:
    """Whether the student reads its images quantized: its quantizers were placed for engines."""
    image = next(node for node in student.graph.nodes if node.op == "placeholder")
    readers = [n for n in image.users if n.target is not aten.sym_size.int]
    return bool(readers) and all(_quantizer(student, n) is not None for n in readers)


def quantize_for_fusion(student: fx.GraphModule) -> None:
    """Call quantizers once more where an engine needs them to compute in integers; no value changes.

    * After what only carries codes on, with the quantizer that the codes come from, which has each of them.
      Engines take pools, slices and the like as operations on codes, and what reads them as reading codes,
      only if quantizers stand on both sides.
    * Between a layer and a ReLU or clip that the quantizer after it does not contain (a zero point above 0, a
      range beyond the clip): rounding keeps the order of values, so that clipping before or after it is the
      same. The layer is computed in integers then, and the clip by itself.

    Args:
        student: prepared; changed in place.
    """
    on_grid: dict[fx.Node, str] = {}
    for node in list(student.graph.nodes):
        name = _quantizer(student, node) or _carried(node, on_grid)
        if name is not None:
            on_grid[node] = name
    for node, name in on_grid.items():
        if node.op != "call_module" and isinstance(node.meta["shape"], tuple):
            _quantize_result(student, node, name)
    for node in list(student.graph.nodes):
        if node.op == "call_function" and node.target in FUSED:
            names = {_quantizer(student, user) for user in node.users}
            name = names.pop() if len(names) == 1 else None
            if name is not None and len(node.args[0].users) == 1 and _clips(student, node, name):
                _quantize_result(student, node.args[0], name)
    student.graph.lint()
    student.recompile()


def share_quantizers(student: fx.GraphModule) -> None:
    """Make one call of those of a quantizer on the same tensor, in place; no value changes.

    ExecuTorch takes a tensor's codes from its only reader, and fails with several.
    """
    calls: dict[tuple[Any, Any], fx.Node] = {}
    for node in list(student.graph.nodes):
        if _quantizer(student, node) is None:
            continue
        first = calls.setdefault((node.target, node.args[0]), node)
        if first is not node:
            node.replace_all_uses_with(first)
            student.graph.erase_node(node)
    student.recompile()


def _quantize_result(student: fx.GraphModule, node: fx.Node, name: str) -> None:
    """Whatever reads a tensor, but for the network's output, reads it through a quantizer."""
    readers = [u for u in node.users if u.op != "output" and isinstance(u.meta["shape"], (tuple, list))]
    if not readers:
        return
    with student.graph.inserting_after(node):
        again = student.graph.call_module(name, (node,))
    again.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, again)


def _clips(student: fx.GraphModule, node: fx.Node, name: str) -> bool:
    """Whether a ReLU or clip does more than the quantizer after it."""
    quantizer = student.get_submodule(name)
    assert isinstance(quantizer, ActivationQuantizer)
    codes = torch.tensor([0.0, 2.0**quantizer.bits - 1])
    lo, hi = ((codes - quantizer.zero_point) * quantizer.scale.detach()).tolist()
    limits: dict[Any, tuple[Any, Any]] = {
        aten.relu.default: (0.0, None),
        aten.relu6.default: (0.0, 6.0),
        aten.clamp_max.default: (None, node.args[1] if len(node.args) > 1 else None),
    }
    if node.target in limits:
        lowest, highest = limits[node.target]
    else:
        default = (-1.0, 1.0) if node.target is aten.hardtanh.default else (None, None)
        lowest, highest = (*node.args[1:3], *default[len(node.args) - 1 :])[:2]
    return (lowest is not None and lo < lowest) or (highest is not None and hi > highest)


def _quantizer(student: fx.GraphModule, node: fx.Node) -> str | None:
    """Name of the activation quantizer that a node calls."""
    if node.op != "call_module":
        return None
    found = student.get_submodule(str(node.target))
    return str(node.target) if isinstance(found, ActivationQuantizer) else None


def _carried(node: fx.Node, on_grid: dict[fx.Node, str]) -> str | None:
    """The quantizer whose codes a node passes on."""
    if node.op != "call_function":
        return None
    source: Any = node.args[0] if node.args else None
    if node.target is CAT:
        names = {on_grid.get(part) for part in source}
        return names.pop() if len(names) == 1 else None
    if node.target not in CARRIERS or not zero_padded(node):
        return None
    return on_grid.get(source) if isinstance(source, fx.Node) else None


@dataclass(frozen=True)
class Fused:
    """How much of a network an engine computes in integers.

    Attributes:
        convolutions, additions: operators in its optimised graph that do.
        float_convolutions, float_additions: that compute in float; the shift of a BatchNorm that no layer
            takes in is no addition.
    """

    convolutions: int
    additions: int
    float_convolutions: int
    float_additions: int

    @property
    def complete(self) -> bool:
        """Whether nothing is left in float."""
        return self.float_convolutions == self.float_additions == 0


def fused_operators(content: bytes, options: SessionOptions | None = None) -> Fused:
    """Count what ONNX Runtime makes of a file's convolutions and additions.

    Raises:
        UsageError: onnx or onnxruntime is not installed.
        JobError: the runtime does not load the file.
    """
    onnx: Any = import_extra("onnx", EXTRA)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimized.onnx"
        EngineModel(content, options, threads=1, saved=str(saved))
        graph = onnx.load(saved).graph
    constants = {tensor.name for tensor in graph.initializer}
    kinds = [n.op_type for n in graph.node if n.op_type != "Add" or not constants.intersection(n.input)]
    return Fused(
        convolutions=kinds.count("QLinearConv"),
        additions=kinds.count("QLinearAdd"),
        float_convolutions=sum(kinds.count(kind) for kind in ("Conv", "FusedConv", "NhwcFusedConv")),
        float_additions=kinds.count("Add"),
    )
