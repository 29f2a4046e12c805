"""Write a graph of ATen operations as JSON and rebuild it, without executing anything that a file brings."""

import operator
import re
from collections.abc import Callable
from keyword import iskeyword
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from zsq.errors import JobError, UsageError
from zsq.graph.tensors import get_tensor

SIZE_ARITHMETIC: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg")
}
FILE_OPERATIONS = ("from_file", "save")
NAMED = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """One dictionary a node: op, name, target, args, kwargs; call_function targets are ATen operations.

    Raises:
        JobError: an operation outside ATen and size arithmetic, which a file cannot name safely.
    """
    return [
        {
            "op": node.op,
            "name": node.name,
            "target": _target_name(node),
            "args": [_encode(a) for a in node.args],
            "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
        }
        for node in graph.nodes
    ]


def graph_from_json(nodes: list[dict[str, Any]], root: nn.Module, class_name: str) -> fx.GraphModule:
    """Rebuild what `graph_to_json` wrote, on the tensors and submodules of `root`.

    Nothing in the description is executed or becomes code: names are those of arguments, of tensors and
    modules of `root`, and of ATen operations that neither write in place nor touch files.

    Raises:
        UsageError: the description is damaged or names anything else.
    """
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    try:
        for entry in nodes:
            op, name = entry["op"], entry["name"]
            args = tuple(_decode(a, values) for a in entry["args"])
            kwargs = {_argument(k): _decode(v, values) for k, v in entry["kwargs"].items()}
            if any(n.op == "output" for n in graph.nodes) or name in values:
                raise ValueError(f"node {name!r} comes twice or after the output")
            if op == "output":
                graph.output(args[0])
            else:
                values[name] = graph.create_node(op, _target(op, entry["target"], root), args, kwargs, name)
        ops = [n.op for n in graph.nodes]
        if ops.count("placeholder") != 1 or ops.count("output") != 1:
            raise ValueError("it needs one input and one output")
        graph.lint()
        return fx.GraphModule(root, graph, class_name)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError, SyntaxError) as error:
        raise UsageError(
            f"The graph in this file is damaged or from another version of zsq ({error}). "
            "Write the file again."
        ) from error


def _target(op: str, target: str, root: nn.Module) -> str | Callable[..., Any]:
    """What a node refers to, checked: torch.fx writes these names into Python code."""
    if op == "call_function":
        return _function(target)
    if op == "placeholder":
        return _argument(target)
    if op == "get_attr":
        get_tensor(root, _path(target))
        return target
    if op == "call_module":
        root.get_submodule(_path(target))
        return target
    raise ValueError(f"unknown kind of node {op!r}")


def _argument(name: str) -> str:
    if not name.isidentifier() or iskeyword(name):
        raise ValueError(f"{name!r} is not the name of an argument")
    return name


def _path(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{name!r} is not the name of a tensor or module")
    return name


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, OpOverload) and node.target.namespace == "aten":
        return str(node.target)
    for name, function in SIZE_ARITHMETIC.items():
        if node.target is function:
            return name
    raise JobError(
        f"The model uses the operation {node.target}, which is outside PyTorch's ATen set and cannot be "
        "saved; replace it by built-in tensor operations."
    )


def _function(name: str) -> Callable[..., Any]:
    if name in SIZE_ARITHMETIC:
        return SIZE_ARITHMETIC[name]
    namespace, packet, overload = name.split(".")
    found = getattr(getattr(torch.ops.aten, packet), overload) if namespace == "aten" else None
    if not isinstance(found, OpOverload) or found._schema.is_mutable or packet in FILE_OPERATIONS:
        raise ValueError(f"{name!r} is not an ATen operation that computes a tensor from tensors")
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, torch.device):
        return {"device": value.type}
    for kind, key in NAMED.items():
        if isinstance(value, kind):
            return {key: str(value).removeprefix("torch.")}
    raise JobError(
        f"The model's graph has an argument of type {type(value).__name__}, which cannot be saved."
    )


def _decode(value: Any, values: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, values) for v in value]
    if not isinstance(value, dict):
        return value
    ((key, name),) = value.items()
    if key == "node":
        return values[name]
    if key == "device":
        return torch.device(name)
    for kind, label in NAMED.items():
        if key == label and isinstance(getattr(torch, name), kind):
            return getattr(torch, name)
    raise ValueError(f"unknown argument {value}")
