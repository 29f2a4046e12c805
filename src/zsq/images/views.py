"""Views: copies of the captured network that see the images differently; parameters stay shared."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

aten = torch.ops.aten
CONVOLUTIONS: dict[Any, int] = {  # -> position of the stride
    aten.conv2d.default: 3,
    aten.conv2d.padding: 3,
    aten.convolution.default: 3,
}
# One [dy, dx] for every strided convolution, in pixels of its input; a tensor if only the device knows them.
Shifts = list[list[int]] | Tensor


def swing(graph_module: fx.GraphModule, *, jitter: int = 1) -> tuple[fx.GraphModule, int]:
    """The network with the input of every strided convolution shifted by a few pixels (swing convolution).

    A convolution that skips pixels leaves gradients on a fixed grid of them, which shows in optimised images;
    random shifts spread them evenly. The input is padded by reflection and cut back to its size elsewhere.

    Args:
        graph_module: from `capture`; left as it is, its tensors are shared.
        jitter: largest shift in pixels of the convolution's input; less where the input is smaller than that
            (an axis of one pixel is not shifted).

    Returns:
        The view, called with images and shifts (see `draw_shifts`), and how many convolutions swing.

    Source: Genie (arXiv:2212.04780), swing convolution; shifts are independent between layers and the same
    for the whole batch, as in its code.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, copies)
    last_placeholder = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last_placeholder):
        shifts = graph.placeholder("shifts")
    strided = [copies[node] for node in graph_module.graph.nodes if _is_strided(node)]
    for layer, node in enumerate(strided):
        with graph.inserting_before(node):
            shifted = graph.call_function(shift_layer, (node.args[0], shifts, layer, jitter))
        node.update_arg(0, shifted)
    graph.output(result)
    graph.lint()
    return fx.GraphModule(graph_module, graph, "Swing"), len(strided)


def draw_shifts(num_layers: int, rng: torch.Generator, *, jitter: int = 1) -> list[list[int]]:
    """Shifts for one forward pass: dy and dx uniform in -jitter..jitter, for every layer.

    Args:
        num_layers: as `swing` counted.
        rng: on the CPU, so that no device has to be waited for.
        jitter: as given to `swing`.
    """
    return (torch.randint(2 * jitter + 1, (num_layers, 2), generator=rng) - jitter).tolist()


def shift_layer(x: Tensor, shifts: Shifts, layer: int, jitter: int) -> Tensor:
    """Input of the strided convolution number `layer`, shifted; what `swing` puts into the graph."""
    for axis, offset in zip((-2, -1), shifts[layer], strict=True):
        most = min(jitter, x.shape[axis] - 1)
        if isinstance(offset, Tensor):
            x = shift_by(x, offset.clamp(-most, most), axis, most=most) if most else x
        else:
            x = shift(x, max(-most, min(most, offset)), axis)
    return x


def shift(x: Tensor, offset: int, axis: int) -> Tensor:
    """y[i] = x[i + offset] along an axis, indices beyond an edge reflected at it (the edge not repeated).

    Args:
        x: any shape, its axis longer than `abs(offset)`.
        offset: 0 returns x itself.
        axis: which axis.

    Raises:
        ValueError: the axis is too short.
    """
    if offset == 0:
        return x
    if abs(offset) >= x.shape[axis]:
        raise ValueError(f"cannot shift by {offset} along an axis of {x.shape[axis]}")
    y: Tensor = _Shift.apply(x, offset, axis)
    return y


def shift_by(x: Tensor, offset: Tensor, axis: int, *, most: int) -> Tensor:
    """`shift` by an offset that only the device knows, same values and gradients.

    Args:
        x: any shape, its axis longer than `most`.
        offset: scalar, int64, -most..most.
        axis: which axis.
        most: largest distance, > 0.
    """
    y: Tensor = _ShiftBy.apply(x, offset, axis, most)
    return y


class _Shift(torch.autograd.Function):
    """One copy forward, one backward, the same bits every time (padding by reflection is not, on CUDA)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: int, axis: int) -> Tensor:
        ctx.offset, ctx.axis = offset, axis
        y = torch.empty_like(x)
        for target, source in _moves(x.shape[axis], offset):
            y.narrow(axis, *target).copy_(x.narrow(axis, *source))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        length, distance = grad.shape[ctx.axis], abs(ctx.offset)
        (target, source), *reflected = _moves(length, ctx.offset)
        result = torch.empty_like(grad)
        result.narrow(ctx.axis, *source).copy_(grad.narrow(ctx.axis, *target))
        result.narrow(ctx.axis, 0 if ctx.offset > 0 else length - distance, distance).zero_()
        for target, source in reflected:
            result.narrow(ctx.axis, *source).add_(grad.narrow(ctx.axis, *target))
        return result, None, None


class _ShiftBy(torch.autograd.Function):
    """y[i] = x[r(i)], r(i) = i + offset reflected; terms of the gradient are added in one order always."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, axis: int, most: int) -> Tensor:
        ctx.save_for_backward(offset)
        ctx.axis, ctx.most = axis, most
        last = x.shape[axis] - 1
        found = torch.arange(last + 1, device=x.device) + offset
        return _select(x, axis, last - (last - found.abs()).abs())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (offset,), axis, most = ctx.saved_tensors, ctx.axis, ctx.most
        last = grad.shape[axis] - 1
        every = torch.arange(last + 1, device=grad.device)
        result = _select(grad, axis, (every - offset).clamp(0, last))
        # Near an edge x[j] may have no y of its own, and another that was reflected to it at either edge.
        for start in (0, last - most):
            near = every[start : start + most + 1]
            own, left, right = near - offset, -near - offset, 2 * last - near - offset
            terms = (
                (own, (own >= 0) & (own <= last)),
                (left, (left >= 0) & (left + offset < 0)),
                (right, (right <= last) & (right + offset > last)),
            )
            pieces = [_select(grad, axis, i.clamp(0, last)) * _along(grad, axis, there) for i, there in terms]
            result.narrow(axis, start, most + 1).copy_(pieces[0] + pieces[1] + pieces[2])
        return result, None, None, None


def _select(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """`x.index_select` that keeps the memory format of images."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        inner = x.permute(0, 2, 3, 1).index_select({-2: 1, -1: 2}[axis], index)
        return inner.permute(0, 3, 1, 2)
    return x.index_select(axis, index)


def _along(x: Tensor, axis: int, values: Tensor) -> Tensor:
    """`values` so that they lie along an axis (from the end) of `x`."""
    return values.to(x.dtype).view(-1, *[1] * (-axis - 1))


def _moves(length: int, offset: int) -> Sequence[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, length) in the result and in the source: the bulk, then the reflected positions one by one."""
    distance = abs(offset)
    bulk = (0, length - distance), (distance, length - distance)
    last = length - 1
    if offset > 0:  # y[last - distance + k] = x[last - k]
        return [bulk, *(((last - distance + k, 1), (last - k, 1)) for k in range(1, distance + 1))]
    return [bulk[::-1], *(((distance - k, 1), (k, 1)) for k in range(1, distance + 1))]


def _is_strided(node: fx.Node) -> bool:
    """Whether a node is a 2-d convolution, not transposed, with a stride other than 1 in any direction."""
    if node.op != "call_function" or node.target not in CONVOLUTIONS:
        return False
    position = CONVOLUTIONS[node.target]
    stride = node.args[position] if len(node.args) > position else node.kwargs.get("stride", 1)
    if node.target is aten.convolution.default and (node.args[6] or len(_sequence(stride)) != 2):
        return False
    return any(s != 1 for s in _sequence(stride))


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
