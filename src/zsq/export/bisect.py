"""The first node at which an exported file and the student part."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from zsq.errors import JobError, import_extra
from zsq.export.builder import EXTRA
from zsq.export.engine import EngineModel, SessionOptions

CHUNK = 32  # images at once
MAX_ERROR = 0.02  # relative error beyond which values differ


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of a difference over that of what was wanted."""
    scale = float(wanted.double().square().mean().sqrt())
    error = float((got.double() - wanted.double()).square().mean().sqrt())
    return error / scale if scale > 0 else error


def first_difference(
    content: bytes, options: SessionOptions, student: fx.GraphModule, images: Tensor
) -> str | None:
    """The first node of the student, in graph order, whose value the engine computes differently.

    Values between the nodes become outputs of the file: all at once, and if the engine then agrees (an output
    in the middle keeps it from fusing), one at a time, by bisection.

    Args:
        content: the ONNX file.
        options: of the session.
        student: the prepared student; its nodes have the names of the file's values.
        images: (N, C, H, W), normalised.
    """
    images = images[:CHUNK]
    tracer = _Values(student)
    with torch.no_grad():
        tracer.run(images)
    names = [n for n in _float_values(content) if n in tracer.found]

    def differing(chosen: list[str]) -> str | None:
        try:
            engine = EngineModel(_with_outputs(content, chosen), options)
            values = pytree.tree_leaves(engine(images))
        except JobError:
            return None
        for name, value in zip(engine.outputs, values, strict=True):
            if name in chosen and relative_error(value, tracer.found[name]) > MAX_ERROR:
                return str(name)
        return None

    found = differing(names)
    if found is not None or not names or differing(names[-1:]) is None:
        return found
    low, high = 0, len(names) - 1  # what differs somewhere differs from there on, as a rule
    while low < high:
        middle = (low + high) // 2
        if differing([names[middle]]) is None:
            low = middle + 1
        else:
            high = middle
    return names[low]


class _Values(fx.Interpreter):
    """Runs a graph and keeps every tensor by its node's name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op == "call_function":
            self.found[n.name] = result
        return result


def _float_values(content: bytes) -> list[str]:
    onnx: Any = import_extra("onnx", EXTRA)
    return [name for node in onnx.load_from_string(content).graph.node for name in node.output]


def _with_outputs(content: bytes, names: Sequence[str]) -> bytes:
    """The file with more of its values as outputs."""
    onnx: Any = import_extra("onnx", EXTRA)
    model = onnx.load_from_string(content)
    known = {output.name for output in model.graph.output}
    for name in names:
        if name not in known:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    result: bytes = model.SerializeToString()
    return result
