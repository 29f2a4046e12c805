"""ONNX for ATen's convolutions, linear layers, norms, pools and resizing."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.export.builder import Builder, as_integers
from zsq.export.codes import StoredCodes

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight before it is known how the layer reads it."""

    stored: StoredCodes
    scale: Tensor
    axis: int
    name: str


def weight_value(b: Builder, weight: Any, *, transposed: bool = False) -> "ir.Value":
    """A layer's weight as a float value, read from its codes or from a float tensor."""
    if not isinstance(weight, StoredWeight):
        return b.op("Transpose", weight, name=f"{weight.name}.t", perm=[1, 0]) if transposed else weight
    stored = weight.stored
    if not transposed:
        return b.dequantized_weight(stored, weight.scale, weight.axis, weight.name)
    turned = replace(stored, codes=stored.codes.t().contiguous())
    return b.dequantized_weight(turned, weight.scale, 1 - weight.axis, weight.name)


def convolution(
    b: Builder,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Any:
    """aten.conv{1,2,3}d; a bias stays in float, inside the convolution."""
    kernel, inputs, common = _operands(b, node, x, weight, bias, stride, dilation, groups)
    if isinstance(padding, str):
        steps = zip(kernel, common["dilations"], strict=True)
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in steps]
        pads = [t // 2 for t in totals] + [t - t // 2 for t in totals]
    else:
        pads = each(padding, len(kernel)) * 2
    return b.op("Conv", *inputs, name=node.name, pads=pads, **common)


def transposed_convolution(
    b: Builder,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Any:
    """aten.conv_transpose{1,2,3}d."""
    kernel, inputs, common = _operands(b, node, x, weight, bias, stride, dilation, groups)
    rank = len(kernel)
    return b.op(
        "ConvTranspose",
        *inputs,
        name=node.name,
        pads=each(padding, rank) * 2,
        output_padding=each(output_padding, rank),
        **common,
    )


def _operands(
    b: Builder, node: fx.Node, x: Any, weight: Any, bias: Any, stride: Any, dilation: Any, groups: int
) -> tuple[list[int], list[Any], dict[str, Any]]:
    """Kernel size, inputs and those attributes that all convolutions have."""
    kernel = _weight_shape(node)[2:]
    inputs = [x, weight_value(b, weight)] + ([bias] if bias is not None else [])
    strides, dilations = each(stride, len(kernel)), each(dilation, len(kernel))
    return (
        kernel,
        inputs,
        {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": groups},
    )


def linear(b: Builder, node: fx.Node, x: Any, weight: Any, bias: Any) -> Any:
    """aten.linear: Gemm on (N, C); on more axes MatMul, or Gemm between reshapes.

    ONNX Runtime fuses a MatMul, and a Gemm without bias, whose operands come from DequantizeLinear, and does
    not load the result if one of them has 2 bits; a Gemm with a float bias stays as it is. One with a bias of
    32-bit integers is computed in integers; else its weight is turned into float at every call.
    """
    outputs, inputs = _weight_shape(node)
    shape = node.args[0].meta["shape"]  # type: ignore[union-attr]
    if len(shape) != 2 and not b.exact:
        product = b.op("MatMul", x, weight_value(b, weight, transposed=True), name=node.name)
        return product if bias is None else b.op("Add", product, bias, name=f"{node.name}.biased")
    if bias is None and b.exact:
        bias = b.tensor(torch.zeros(outputs), f"{node.name}.no_bias")
    if len(shape) != 2:
        x = b.op("Reshape", x, b.integers([-1, inputs]), name=f"{node.name}.rows")
    if bias is not None and b.integer_biases and isinstance(weight, StoredWeight):
        bias = _integer_bias(b, node, x, weight, bias)
    operands = [x, weight_value(b, weight)] + ([bias] if bias is not None else [])
    y = b.op("Gemm", *operands, name=node.name, transB=1)
    return y if len(shape) == 2 else reshape_to(b, y, node.meta["shape"], f"{node.name}.shaped")


def _integer_bias(b: Builder, node: fx.Node, x: Any, weight: StoredWeight, bias: Any) -> Any:
    """A bias in steps of the input's scale times the weight's, if the input comes from codes."""
    source = x.producer()
    scale = (
        source.inputs[1].const_value if source is not None and source.op_type == "DequantizeLinear" else None
    )
    if scale is None:
        return bias
    step = weight.scale.detach().double() / weight.stored.finer * float(scale.numpy())
    return b.bias(bias, step, f"{node.name}.bias")


def batch_norm(
    b: Builder, node: fx.Node, x: Any, gamma: Any, beta: Any, mean: Any, var: Any, training: bool, *_: Any
) -> Any:
    """aten.batch_norm with stored statistics that no layer takes in: a multiplication and an addition."""
    affine = node.meta.get("affine")
    if affine is None or training:
        raise UsageError(f"The BatchNorm {node.name} has no stored statistics, so it cannot be exported.")
    shape = [-1] + [1] * (len(node.meta["shape"]) - 2)
    factor, shift = (
        b.tensor(t.float().view(shape), f"{node.name}.{n}")
        for t, n in zip(affine, ("factor", "shift"), strict=True)
    )
    return b.op("Add", b.op("Mul", x, factor, name=f"{node.name}.scaled"), shift, name=node.name)


def layer_norm(
    b: Builder, node: fx.Node, x: Any, shape: Any, weight: Any, bias: Any, eps: float, *_: Any
) -> Any:
    """aten.layer_norm."""
    size = as_integers(shape)
    if weight is None:
        weight = b.tensor(torch.ones(size), f"{node.name}.ones")
    inputs = [x, weight] + ([bias] if bias is not None else [])
    return b.op("LayerNormalization", *inputs, name=node.name, axis=-len(size), epsilon=eps)


def group_norm(
    b: Builder, node: fx.Node, x: Any, groups: int, weight: Any, bias: Any, eps: float, *_: Any
) -> Any:
    """aten.group_norm."""
    return b.op(
        "GroupNormalization",
        x,
        *_affine(b, node, weight, bias),
        name=node.name,
        num_groups=groups,
        epsilon=eps,
    )


def instance_norm(
    b: Builder,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    own: bool,
    _: Any,
    eps: float,
    *__: Any,
) -> Any:
    """aten.instance_norm by the statistics of each image; by stored ones it is a BatchNorm."""
    if not own:
        raise UsageError(f"The norm {node.name} has stored statistics: write it as a BatchNorm to export it.")
    return b.op("InstanceNormalization", x, *_affine(b, node, weight, bias), name=node.name, epsilon=eps)


def _affine(b: Builder, node: fx.Node, weight: Any, bias: Any) -> tuple[Any, Any]:
    """Factors and terms of the channels of a norm, 1 and 0 where it has none."""
    channels = node.meta["shape"][1]
    weight = b.tensor(torch.ones(channels), f"{node.name}.ones") if weight is None else weight
    bias = b.tensor(torch.zeros(channels), f"{node.name}.zeros") if bias is None else bias
    return weight, bias


def reshape_to(b: Builder, x: Any, shape: tuple[int | None, ...], name: str) -> Any:
    """A reshape to a shape of which at most one dimension grows with the batch."""
    if sum(size is None for size in shape) > 1:
        raise UsageError(
            f"The operation {name} makes a tensor in which several dimensions grow with the batch; such a "
            "model cannot be exported for any batch size."
        )
    return b.op("Reshape", x, b.integers([-1 if size is None else size for size in shape]), name=name)


def _weight_shape(node: fx.Node) -> list[int]:
    return [int(size) for size in shape_of(node, 1)]


def shape_of(node: fx.Node, index: int) -> tuple[int, ...]:
    """Of an argument that is a tensor."""
    source = node.args[index]
    assert isinstance(source, fx.Node)
    shape: tuple[int, ...] = source.meta["shape"]
    return shape


def each(value: Any, rank: int) -> list[int]:
    """One number an axis."""
    numbers = as_integers(value)
    return numbers * rank if len(numbers) == 1 else numbers
