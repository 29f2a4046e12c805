"""Views: copies of the captured network that see the images differently; parameters stay shared."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from zsq.graph.nodes import aten

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
    if isinstance(shifts, Tensor):
        return shift_by(x, shifts[layer], jitter)
    for axis, offset in zip((-2, -1), shifts[layer], strict=True):
        most = min(jitter, x.shape[axis] - 1)
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


def shift_by(x: Tensor, offsets: Tensor, jitter: int) -> Tensor:
    """`shift` in both directions by offsets that only the device knows, same values and gradients.

    Args:
        x: (N, C, H, W).
        offsets: [dy, dx], (2,), int64, cut to -jitter..jitter, and to less where `x` is smaller.
        jitter: largest distance.
    """
    tables = _shift_tables((x.shape[-2], x.shape[-1]), jitter, x.device)
    y: Tensor = _ShiftBy.apply(x, tables.row_of(offsets), tables)
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
    """One gather forward; backward another, and one of what reflection adds near the edges."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor, tables: "_ShiftTables") -> Tensor:
        ctx.save_for_backward(row)
        ctx.tables = tables
        return _as_images(_pixels(x).index_select(1, _row(tables.source, row)), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (row,), tables = ctx.saved_tensors, ctx.tables
        pixels = _pixels(grad)
        result = pixels.index_select(1, _row(tables.own, row))
        terms = pixels.index_select(1, _row(tables.terms, row)).unflatten(1, (-1, 4))
        result.index_copy_(1, tables.near, (terms * _row(tables.weights, row).to(grad.dtype)).sum(2))
        return _as_images(result, grad), None, None


@dataclass(frozen=True)
class _ShiftTables:
    """Pixels (row-major) by shift, of which there are K, for images of one size.

    Attributes:
        limits: lowest and highest [dy, dx], and the factors that make a number of them, (3, 2).
        source: (K, H W), where a pixel of y comes from.
        own: (K, H W), to which pixel of y one of x goes, or any.
        near: (P,), the pixels of x near an edge, which go to none, one or several.
        terms, weights: (K, 4 P) and (K, P, 4, 1): to which, and 1.0 or 0.0.
    """

    limits: Tensor
    source: Tensor
    own: Tensor
    near: Tensor
    terms: Tensor
    weights: Tensor

    def row_of(self, offsets: Tensor) -> Tensor:
        """Row of the tables for offsets [dy, dx], (1,)."""
        lowest, highest, factors = self.limits.unbind(0)
        return ((offsets.clamp(min=lowest, max=highest) - lowest) * factors).sum(0, keepdim=True)


def _row(table: Tensor, row: Tensor) -> Tensor:
    """One row of a table, without the host knowing which."""
    return table.index_select(0, row).squeeze(0)


@lru_cache(maxsize=64)
def _shift_tables(size: tuple[int, int], jitter: int, device: torch.device) -> _ShiftTables:
    most = (min(jitter, size[0] - 1), min(jitter, size[1] - 1))
    axes = [_axis_tables(length, distance) for length, distance in zip(size, most, strict=True)]
    (source_y, own_y, terms_y, weights_y), (source_x, own_x, terms_x, weights_x) = axes
    width = size[1]

    def plane(rows: Tensor, columns: Tensor) -> Tensor:  # (Ky, H), (Kx, W) -> (Ky Kx, H W)
        return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)

    edge_y, edge_x = (
        (torch.arange(length) <= distance) | (torch.arange(length) >= length - 1 - distance)
        for length, distance in zip(size, most, strict=True)
    )
    near = (edge_y[:, None] | edge_x[None, :]).flatten().nonzero()[:, 0]
    terms, weights = [], []
    for a in (0, 1):
        for b in (0, 1):
            terms.append(plane(terms_y[..., a], terms_x[..., b])[:, near])
            both = weights_y[:, None, :, None, a] * weights_x[None, :, None, :, b]
            weights.append(both.flatten(2).flatten(0, 1)[:, near])
    return _ShiftTables(
        torch.tensor([[-m for m in most], list(most), [2 * most[1] + 1, 1]], device=device),
        plane(source_y, source_x).to(device),
        plane(own_y, own_x).to(device),
        near.to(device),
        torch.stack(terms, 2).flatten(1).to(device),
        torch.stack(weights, 2)[..., None].to(device),
    )


def _axis_tables(length: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For offsets -most..most along one axis: source and own (K, L), terms and weights (K, L, 2).

    y[i] = x[r(i)], r(i) = i + offset reflected at 0 and at the last position. So x[j] goes to y[j - offset],
    if that is there, and where r was reflected to j: to y[-j - offset] or y[2 last - j - offset].
    """
    last = length - 1
    offset, j = torch.arange(-most, most + 1)[:, None], torch.arange(length)[None]
    source = last - (last - (j + offset).abs()).abs()
    own = j - offset
    mirrored = torch.where(offset < 0, -j - offset, 2 * last - j - offset)
    reached = torch.where(offset < 0, (mirrored >= 0) & (j > 0), (mirrored <= last) & (j < last))
    terms = torch.stack((own, mirrored), -1)
    weights = torch.stack(((own >= 0) & (own <= last), reached & (offset != 0)), -1)
    return source, own.clamp(0, last), terms.clamp(0, last), weights.float()


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N, H W, C) if it is channels-last in memory, else as (N C, H W, 1)."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).flatten(1, 2)
    return x.reshape(-1, x.shape[2] * x.shape[3], 1)


def _as_images(pixels: Tensor, like: Tensor) -> Tensor:
    """What `_pixels` made of images of the shape and memory format of `like`, as images again."""
    n, c, h, w = like.shape
    if like.is_contiguous(memory_format=torch.channels_last):
        return pixels.view(n, h, w, c).permute(0, 3, 1, 2)
    return pixels.view(n, c, h, w)


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
