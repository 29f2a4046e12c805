"""Capture a model as a graph of ATen operations that shares the model's own parameters."""

import copy
import inspect
import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from zsq.errors import UsageError
from zsq.graph.attention import write_out_attention
from zsq.graph.tensors import device_of, get_tensor, make_submodule

aten = torch.ops.aten
M = TypeVar("M", bound=nn.Module)
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
LAYERS: dict[Any, int] = {  # operation -> axis of its weight that counts output channels
    aten.conv1d.default: 0,
    aten.conv2d.default: 0,
    aten.conv3d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.padding: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.conv_transpose3d.input: 1,
    aten.linear.default: 0,
}


def capture(module: nn.Module, input_size: tuple[int, int, int]) -> fx.GraphModule:
    """Record what `module` computes in eval mode, for any batch size.

    The result has one placeholder (images, (N, C, H, W)), holds the module's own tensors (no copies), no
    operation that writes in place and no dropout; fused attention is written out, and everything that does
    not depend on the images is computed once. Its output is that of the module, with dictionaries and nested
    tuples flattened to one tuple.

    Args:
        module: any network of one image tensor.
        input_size: (C, H, W).

    Raises:
        UsageError: torch.export cannot follow the module, or its graph does not compute what the module does.

    Source: torch.export (training IR, no decompositions).
    """
    module = module.eval()
    _check_inputs(module)
    device = device_of(module)
    example = torch.zeros(2, *input_size, device=device)
    batch = torch.export.Dim("batch", min=1)
    try:
        with quiet():
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
            graph_module = program.module(check_guards=False)
    except Exception as error:  # torch.export raises dozens of unrelated classes
        raise UsageError(_explain(error, input_size)) from error
    graph_module = _flat_signature(graph_module)
    _remove_identities(graph_module)
    _remove_in_place(graph_module)
    _accept_any_strides(graph_module)
    write_out_attention(graph_module.graph)
    _remove_unused(graph_module)
    _fold_constants(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    _check(graph_module, module, images.to(device))
    return graph_module


def moved(module: M, device: torch.device | str) -> M:
    """A copy on a device; of a captured graph, what it creates in its course is created there too.

    A module all of whose tensors are there, or that has none (a file in an engine), is returned itself.

    Networks are captured on the CPU and moved afterwards: so a graph is the same for every device. (On CUDA
    torch.export would hold fast which kernel of BatchNorm it chose, and with it a largest number of images.)
    """
    target = torch.device(device)
    if all(tensor.device == target for tensor in (*module.parameters(), *module.buffers())):
        return module
    found = copy.deepcopy(module).to(target)
    if isinstance(found, fx.GraphModule):

        def there(argument: Any) -> Any:
            return target if isinstance(argument, torch.device) else argument

        for node in found.graph.nodes:
            node.args = fx.node.map_aggregate(node.args, there)
            node.kwargs = fx.node.map_aggregate(node.kwargs, there)
        found.recompile()
    return found


def weight_node(node: fx.Node) -> fx.Node | None:
    """The get_attr node of a convolution's or linear layer's weight; None for any other node."""
    if node.op != "call_function" or node.target not in LAYERS:
        return None
    weight = node.args[1]
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def layer_name(node: fx.Node) -> str:
    """Name of a weighted node: that of its weight without the last part, `layer1.0.conv1`."""
    weight = weight_node(node)
    if weight is None:
        raise ValueError(f"{node.name} has no weight")
    return str(weight.target).rpartition(".")[0] or str(weight.target)


def module_path(node: fx.Node) -> str:
    """Dotted name of the module whose forward wrote this node; "" for the outermost one."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def activations(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose value depends on the images, in order, without shapes (SymInt) and the output."""
    depends: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder" or any(a in depends for a in node.all_input_nodes):
            value = node.meta.get("val")
            if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int)):
                depends.add(node)
                found.append(node)
    return found


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the graph returns."""
    return list(next(n for n in graph.nodes if n.op == "output").all_input_nodes)


def _check_inputs(module: nn.Module) -> None:
    """Refuse a forward that one tensor is not enough for."""
    signature = inspect.signature(module.forward)
    try:
        signature.bind(None)
    except TypeError as error:
        raise UsageError(
            f"The model's forward takes {signature}; zsq needs a model of one image tensor. Wrap it in a "
            "module whose forward takes the images alone."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch.export from printing the graph of a failed capture, and from logging."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _explain(error: Exception, input_size: tuple[int, int, int]) -> str:
    """One paragraph for a failure of torch.export: which kind it is and what to change."""
    text = str(error)
    places = re.findall(r'File "([^"]+)", line (\d+), in \w+', text)
    where = f" ({places[-1][0]}, line {places[-1][1]})" if places else ""
    if "data-dependent" in text:
        return (
            "The model cannot be captured: its forward takes another path, or another shape, depending on "
            f"the values in a tensor{where}. zsq needs a forward without `if`, `.item()` or loops on tensor "
            "values; replace them by torch.where or masks."
        )
    if "Constraints violated (batch)" in text:
        return (
            "The model cannot be captured: its forward depends on the number of images (a branch or loop "
            "over x.shape[0], or a reshape that fixes it). zsq needs one forward for any batch size; write "
            "x.flatten(1) or x.view(x.shape[0], -1)."
        )
    reason = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return (
        f"torch.export cannot capture this model with input {input_size}: {type(error).__name__}: "
        f"{reason.rstrip('.')}. Check the input size; zsq needs a forward of plain tensor operations, "
        "without NumPy, branches on tensor values or a fixed batch size."
    )


def _flat_signature(exported: fx.GraphModule) -> fx.GraphModule:
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


def _remove_in_place(graph_module: fx.GraphModule) -> None:
    """Turn `add_`, `relu_` into `add`, `relu`; later readers of the overwritten tensor read the result."""
    graph = graph_module.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        if not target._schema.is_mutable or not target._schema.name.endswith("_"):
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


def _remove_identities(graph_module: fx.GraphModule) -> None:
    """Remove dropout and the like, which return the very tensor that a later write in place may mean."""
    for node in list(graph_module.graph.nodes):
        source = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(source, fx.Node):
            continue
        noop = node.target in IDENTITIES or (
            node.target is aten.slice.Tensor and _shape(node) is not None and _shape(node) == _shape(source)
        )
        if noop:
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)


def _shape(node: fx.Node) -> tuple[str, ...] | None:
    value = node.meta.get("val")
    return tuple(map(str, value.shape)) if isinstance(value, Tensor) else None


def _accept_any_strides(graph_module: fx.GraphModule) -> None:
    """`reshape` for `view`: the same values, and it takes channels-last tensors too."""
    for node in graph_module.graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default


def _remove_unused(graph_module: fx.GraphModule) -> None:
    """Remove what nothing reads, also assertions on metadata, which fx keeps."""
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph_module.graph.erase_node(node)


def _fold_constants(graph_module: fx.GraphModule) -> None:
    """Compute what depends on parameters only (standardised weights, position tables), as a buffer."""
    graph = graph_module.graph
    varying = set(activations(graph))
    known: dict[fx.Node, Any] = {}  # tensors, and tuples of them
    for node in list(graph.nodes):
        if node in varying or node.op == "output":
            continue
        if node.op == "get_attr":
            known[node] = get_tensor(graph_module, str(node.target))
        elif node.op == "call_function" and all(a in known for a in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(known.get(node), Tensor):
            continue
        if any(user not in known for user in node.users):
            layer = next((u for u in node.users if u.target in LAYERS and u.args[1] is node), None)
            path = module_path(layer) if layer is not None else ""
            name = f"{path}.constant_{node.name}".lstrip(".")
            owner, _, leaf = name.rpartition(".")
            make_submodule(graph_module, owner).register_buffer(leaf, known[node].detach())
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
    graph.eliminate_dead_code()


def _check(graph_module: fx.GraphModule, module: nn.Module, images: Tensor) -> None:
    """Refuse a graph that computes something else than the module (an aliasing write, a fixed batch size)."""
    with torch.no_grad():
        try:
            expected = [t for t in pytree.tree_leaves(module(images)) if isinstance(t, Tensor)]
            got = pytree.tree_leaves(graph_module(images))
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(
                f"The captured model fails at another batch size: {reason.rstrip('.')}. Write its forward "
                "for any number of images: x.flatten(1) or x.view(x.shape[0], -1)."
            ) from error
    same = len(got) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(got, expected, strict=True)
    )
    if not same:
        raise UsageError(
            "The captured graph does not compute what the model computes: its forward may write in place to "
            "a part of a tensor (y[:, 0] = 0), draw random numbers, or depend on the number of images. Write "
            "it without these; torch.where and torch.cat replace such writes."
        )
