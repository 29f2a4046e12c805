"""ONNX for ATen's reshapes, slices, concatenations and the like."""

from typing import Any

import torch
from torch import fx

from zsq.errors import UsageError
from zsq.export.builder import Builder, as_integers
from zsq.export.layers import reshape_to


def reshape(b: Builder, node: fx.Node, x: Any, *_: Any) -> Any:
    """Whatever only changes the shape."""
    return reshape_to(b, x, node.meta["shape"], node.name)


def permute(b: Builder, node: fx.Node, x: Any, dims: Any) -> Any:
    """aten.permute."""
    rank = len(node.meta["shape"])
    return b.op("Transpose", x, name=node.name, perm=[d % rank for d in as_integers(dims)])


def transpose(b: Builder, node: fx.Node, x: Any, first: int, second: int) -> Any:
    """aten.transpose of two axes."""
    order = list(range(len(node.meta["shape"])))
    order[first], order[second] = order[second], order[first]
    return b.op("Transpose", x, name=node.name, perm=order)


def pad(b: Builder, node: fx.Node, x: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Any:
    """aten.pad and aten.constant_pad_nd; ATen counts axes from the last one."""
    if isinstance(mode, (int, float)):  # constant_pad_nd
        mode, value = "constant", mode
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    rank = len(node.meta["shape"])
    before, after = [0] * rank, [0] * rank
    for index, (low, high) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        before[rank - 1 - index], after[rank - 1 - index] = int(low), int(high)
    fill = b.number(value) if value else None
    inputs = [x, b.integers(before + after), *([fill] if fill is not None else [])]
    return b.op("Pad", *inputs, name=node.name, mode=modes[mode])


def slice(b: Builder, node: fx.Node, x: Any, dim: int, start: Any, end: Any, step: int) -> Any:
    """aten.slice."""
    stop = min(end, 2**31 - 1) if end is not None else 2**31 - 1
    bounds = [b.integers([v]) for v in (start or 0, stop, dim, step)]
    return b.op("Slice", x, *bounds, name=node.name)


def roll(b: Builder, node: fx.Node, x: Any, shifts: Any, dims: Any) -> Any:
    """aten.roll over axes of known size: the end of each axis, then its beginning."""
    shape = node.meta["shape"]
    for shift, dim in zip(as_integers(shifts), as_integers(dims), strict=False):
        size = shape[dim]
        if size is None:
            raise UsageError(f"The operation {node.name} rolls the batch, which cannot be exported.")
        cut = -shift % size
        axis, name = b.integers([dim]), f"{node.name}.{dim % len(shape)}"
        end = b.op("Slice", x, b.integers([cut]), b.integers([size]), axis, name=f"{name}.end")
        start = b.op("Slice", x, b.integers([0]), b.integers([cut]), axis, name=f"{name}.start")
        x = b.op("Concat", end, start, name=name, axis=dim)
    if not as_integers(dims):
        raise UsageError(f"The operation {node.name} rolls a flattened tensor, which cannot be exported.")
    return x


def select(b: Builder, node: fx.Node, x: Any, dim: int, index: int) -> Any:
    """aten.select."""
    return b.op("Gather", x, b.integers(index), name=node.name, axis=dim)


def pixel_unshuffle(b: Builder, node: fx.Node, x: Any, factor: int) -> Any:
    """aten.pixel_unshuffle: channel by channel, unlike ONNX's SpaceToDepth."""
    channels, height, width = node.meta["shape"][1:]
    blocks = [-1, channels // factor**2, height, factor, width, factor]
    parts = b.op("Reshape", x, b.integers(blocks), name=f"{node.name}.blocks")
    turned = b.op("Transpose", parts, name=f"{node.name}.turned", perm=[0, 1, 3, 5, 2, 4])
    return reshape_to(b, turned, node.meta["shape"], node.name)


def repeat(b: Builder, node: fx.Node, x: Any, times: Any) -> Any:
    """aten.repeat by whole numbers; axes may be added in front."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    counts = list(times)
    if not all(isinstance(count, int) for count in counts):
        raise UsageError(f"The operation {node.name} repeats by the batch, which cannot be exported.")
    added = len(counts) - len(source.meta["shape"])
    if added:
        x = b.op("Unsqueeze", x, b.integers(list(range(added))), name=f"{node.name}.wider")
    return b.op("Tile", x, b.integers(counts), name=node.name)


def flip(b: Builder, node: fx.Node, x: Any, dims: Any) -> Any:
    """aten.flip."""
    axes = as_integers(dims)
    bounds = [[value] * len(axes) for value in (-1, -(2**31), -1)]
    start, stop, step = (b.integers(values) for values in bounds)
    return b.op("Slice", x, start, stop, b.integers(axes), step, name=node.name)


def index(b: Builder, node: fx.Node, x: Any, indices: Any) -> Any:
    """aten.index by one tensor of whole numbers."""
    axes = [axis for axis, chosen in enumerate(indices) if chosen is not None]
    if len(axes) != 1:
        raise UsageError(f"The operation {node.name} indexes several axes at once, which cannot be exported.")
    return b.op("Gather", x, indices[axes[0]], name=node.name, axis=axes[0])


def unfold(b: Builder, node: fx.Node, x: Any, dim: int, size: int, step: int) -> Any:
    """aten.unfold: windows of an axis, whose elements become the last axis."""
    rank = len(node.meta["shape"]) - 1
    axis = dim % rank
    starts = torch.arange(node.meta["shape"][axis]) * step
    windows = b.tensor(starts[:, None] + torch.arange(size), f"{node.name}.windows")
    found = b.op("Gather", x, windows, name=f"{node.name}.gathered", axis=axis)
    order = [k for k in range(rank + 1) if k != axis + 1]
    return b.op("Transpose", found, name=node.name, perm=[*order, axis + 1])


def patches(b: Builder, node: fx.Node, x: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    """aten.im2col: the pixels of all patches, (N, C kernel, patches)."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    channels, *sizes = source.meta["shape"][1:]
    places, width = [], 1
    for size, k, d, p, s in zip(sizes, kernel, dilation, padding, stride, strict=True):
        count = (size + 2 * p - d * (k - 1) - 1) // s + 1
        places.append(torch.arange(k)[:, None] * d + torch.arange(count) * s)  # (in a patch, patches)
        width = size + 2 * p
    if any(padding):
        edges = [0, 0, *padding]
        x = b.op("Pad", x, b.integers(edges + edges), name=f"{node.name}.padded", mode="constant")
    rows, columns = places
    # axes: kernel down, kernel across, patches down, patches across
    pixels = rows[:, None, :, None] * width + columns[None, :, None, :]
    pixels = pixels.reshape(rows.shape[0] * columns.shape[0], -1)
    flat = b.op("Reshape", x, b.integers([0, channels, -1]), name=f"{node.name}.flat")
    found = b.op("Gather", flat, b.tensor(pixels, f"{node.name}.pixels"), name=f"{node.name}.found", axis=2)
    return reshape_to(b, found, node.meta["shape"], node.name)


def split(b: Builder, node: fx.Node, x: Any, _: Any, dim: int = 0) -> Any:
    """aten.chunk and aten.split."""
    sizes = [shape[dim] for shape in node.meta["shape"]]
    if None in sizes:
        raise UsageError(f"The operation {node.name} splits the batch, which cannot be exported.")
    names = [f"{node.name}.{i}" for i in range(len(sizes))]
    return b.ops("Split", x, b.integers(sizes), names=names, axis=dim)


def unbind(b: Builder, node: fx.Node, x: Any, dim: int) -> Any:
    """aten.unbind."""
    return [
        b.op("Gather", x, b.integers(i), name=f"{node.name}.{i}", axis=dim)
        for i in range(len(node.meta["shape"]))
    ]


def cat(b: Builder, node: fx.Node, parts: Any, dim: int) -> Any:
    """aten.cat."""
    return b.op("Concat", *parts, name=node.name, axis=dim)


def stack(b: Builder, node: fx.Node, parts: Any, dim: int) -> Any:
    """aten.stack."""
    axis = b.integers([dim])
    wider = [b.op("Unsqueeze", p, axis, name=f"{node.name}.{i}") for i, p in enumerate(parts)]
    return b.op("Concat", *wider, name=node.name, axis=dim)


def expand(b: Builder, node: fx.Node, x: Any, *_: Any) -> Any:
    """Repeat along axes of size 1; one that grows with the batch stays, or becomes the number of images."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape, before = node.meta["shape"], source.meta["shape"]
    before = (1,) * (len(shape) - len(before)) + tuple(before)
    sizes = [1 if old is None else new for old, new in zip(before, shape, strict=True)]
    if None not in sizes:
        return b.op("Expand", x, b.integers(sizes), name=node.name)
    if None in sizes[1:]:
        raise UsageError(
            f"The operation {node.name} repeats a tensor in an unknown number, which cannot be exported."
        )
    image = next(n for n in node.graph.nodes if n.op == "placeholder")
    batch = b.op("Shape", image.meta["value"], name=f"{node.name}.batch", start=0, end=1)
    size = b.op("Concat", batch, b.integers(sizes[1:]), name=f"{node.name}.shape", axis=0)
    return b.op("Expand", x, size, name=node.name)


def repeat_interleave(b: Builder, node: fx.Node, x: Any, repeats: int, dim: Any = None, *_: Any) -> Any:
    """aten.repeat_interleave: every element of an axis so many times in a row."""
    rank = len(node.meta["shape"])
    if dim is None:
        raise UsageError(f"The operation {node.name} repeats a flattened tensor, which cannot be exported.")
    after = dim % rank + 1
    wider = b.op("Unsqueeze", x, b.integers([after]), name=f"{node.name}.wider")
    times = b.integers([repeats if axis == after else 1 for axis in range(rank + 1)])
    repeated = b.op("Tile", wider, times, name=f"{node.name}.repeated")
    return reshape_to(b, repeated, node.meta["shape"], node.name)


def identity(b: Builder, node: fx.Node, x: Any, *_: Any) -> Any:
    """What copies."""
    return x


def pixel_shuffle(b: Builder, node: fx.Node, x: Any, factor: int) -> Any:
    """aten.pixel_shuffle."""
    return b.op("DepthToSpace", x, name=node.name, blocksize=factor, mode="CRD")
