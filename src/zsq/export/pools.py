"""ONNX for ATen's pools and resizes of feature maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.export.builder import Builder
from zsq.export.layers import each, shape_of


def max_pool(
    b: Builder, node: fx.Node, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> Any:
    """aten.max_pool2d."""
    return _pool(b, node, "MaxPool", x, kernel, stride, padding, ceil, dilations=each(dilation, 2))


def avg_pool(
    b: Builder,
    node: fx.Node,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool,
    count_padding: bool,
    divisor: int | None,
) -> Any:
    """aten.avg_pool2d."""
    if divisor is not None:
        raise UsageError(f"The pool {node.name} divides by {divisor}, which ONNX has no pool for.")
    counts = {"count_include_pad": int(count_padding)}
    return _pool(b, node, "AveragePool", x, kernel, stride, padding, ceil, **counts)


def _pool(
    b: Builder,
    node: fx.Node,
    kind: str,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool,
    **attributes: Any,
) -> Any:
    size = each(kernel, 2)
    return b.op(
        kind,
        x,
        name=node.name,
        kernel_shape=size,
        strides=each(stride, 2) if stride else size,
        pads=each(padding, 2) * 2,
        ceil_mode=int(ceil),
        **attributes,
    )


def adaptive_avg_pool(b: Builder, node: fx.Node, x: Any, size: Any) -> Any:
    """aten.adaptive_avg_pool2d; onto sizes that do not divide the input's as products with matrices."""
    before, after = shape_of(node, 0)[-2:], node.meta["shape"][-2:]
    if tuple(after) == (1, 1):
        return b.op("GlobalAveragePool", x, name=node.name)
    kernel = _whole_windows(before, after)
    if kernel is None:
        rows, columns = (_averages(h, k) for h, k in zip(before, after, strict=True))
        x = b.op("MatMul", x, b.tensor(columns.T, f"{node.name}.columns"), name=f"{node.name}.narrow")
        return b.op("MatMul", b.tensor(rows, f"{node.name}.rows"), x, name=node.name)
    return b.op("AveragePool", x, name=node.name, kernel_shape=kernel, strides=kernel)


def adaptive_max_pool(b: Builder, node: fx.Node, x: Any, size: Any) -> Any:
    """aten.adaptive_max_pool2d onto sizes that divide the input's; the places of the maxima are left out."""
    before, after = shape_of(node, 0)[-2:], node.meta["shape"][0][-2:]
    kernel = _whole_windows(before, after)
    if kernel is None:
        raise UsageError(f"The pool {node.name} maps {before} onto {after}; ONNX needs a divisor.")
    return b.op("MaxPool", x, name=node.name, kernel_shape=kernel, strides=kernel), None


def _whole_windows(before: Sequence[int], after: Sequence[int]) -> list[int] | None:
    """How many times as large one size is as another, an axis each; None if not by whole numbers."""
    if any(h % k for h, k in zip(before, after, strict=True)):
        return None
    return [h // k for h, k in zip(before, after, strict=True)]


def _averages(size: int, onto: int) -> Tensor:
    """(onto, size): output i is the mean of positions floor(i size / onto) to ceil((i + 1) size / onto)."""
    found = torch.zeros(onto, size)
    for i in range(onto):
        start, stop = i * size // onto, -(-(i + 1) * size // onto)
        found[i, start:stop] = 1 / (stop - start)
    return found


def resize_nearest(b: Builder, node: fx.Node, x: Any, *_: Any) -> Any:
    """aten.upsample_nearest2d: output pixel i reads input pixel floor(i * in / out)."""
    return _resize(
        b, node, x, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


def resize_bilinear(b: Builder, node: fx.Node, x: Any, _: Any, align_corners: bool, *__: Any) -> Any:
    """aten.upsample_bilinear2d."""
    return _resize(b, node, x, mode="linear", coordinate_transformation_mode=_corners(align_corners))


def resize_bicubic(b: Builder, node: fx.Node, x: Any, _: Any, align_corners: bool, *__: Any) -> Any:
    """aten.upsample_bicubic2d, whose kernel has the coefficient -0.75."""
    form = _corners(align_corners)
    return _resize(b, node, x, mode="cubic", coordinate_transformation_mode=form, cubic_coeff_a=-0.75)


def _corners(aligned: bool) -> str:
    return "align_corners" if aligned else "half_pixel"


def _resize(b: Builder, node: fx.Node, x: Any, **attributes: Any) -> Any:
    """By the factors that were asked for, or to the size; whole factors are named in either case."""
    before, after = shape_of(node, 0)[-2:], node.meta["shape"][-2:]
    size, scales = node.args[1], node.args[-1] if isinstance(node.args[-1], (list, tuple)) else None
    if size is not None and any(k % h for h, k in zip(before, after, strict=True)):
        sizes = b.integers([int(k) for k in after])
        return b.op("Resize", x, None, None, sizes, name=node.name, axes=[2, 3], **attributes)
    asked = scales if size is None and scales else [k / h for h, k in zip(before, after, strict=True)]
    factors = b.tensor(torch.tensor([1.0, 1.0, *map(float, asked)]), f"{node.name}.scales")
    return b.op("Resize", x, None, factors, name=node.name, **attributes)
