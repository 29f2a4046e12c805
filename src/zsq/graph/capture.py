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
from torch.utils import _pytree as pytree

from zsq.errors import UsageError
from zsq.graph.attention import write_out_attention
from zsq.graph.cleanup import (
    accept_any_strides,
    flat_signature,
    inline_regions,
    remove_identities,
    remove_in_place,
    remove_unused,
)
from zsq.graph.constants import fold_constants
from zsq.graph.tensors import device_of

M = TypeVar("M", bound=nn.Module)


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
    inline_regions(graph_module)
    graph_module = flat_signature(graph_module)
    remove_identities(graph_module)
    write_out_attention(graph_module.graph)
    fold_constants(graph_module)
    remove_in_place(graph_module)
    accept_any_strides(graph_module)
    remove_unused(graph_module)
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
            "over x.shape[0], len(x), or a reshape that fixes it). zsq needs one forward for any batch size; "
            "write x.shape[0] for len(x), and x.flatten(1) or x.view(x.shape[0], -1)."
        )
    reason = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return (
        f"torch.export cannot capture this model with input {input_size}: {type(error).__name__}: "
        f"{reason.rstrip('.')}. Check the input size; zsq needs a forward of plain tensor operations, "
        "without NumPy, branches on tensor values or a fixed batch size."
    )


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
