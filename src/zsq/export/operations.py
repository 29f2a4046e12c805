"""Which ONNX operators stand for which ATen operation: one table."""

import math
from typing import Any

import torch
from torch import fx

from zsq.errors import UsageError
from zsq.export import arithmetic, layers, pools, shapes
from zsq.export.builder import Builder
from zsq.graph.nodes import aten

EMITTERS: dict[Any, arithmetic.Emitter] = {
    # layers, norms, pools
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), layers.convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), layers.convolution),
    aten.conv_transpose1d.default: layers.transposed_convolution,
    aten.conv_transpose2d.input: layers.transposed_convolution,
    aten.conv_transpose3d.input: layers.transposed_convolution,
    aten.linear.default: layers.linear,
    aten.batch_norm.default: layers.batch_norm,
    aten.layer_norm.default: layers.layer_norm,
    aten.group_norm.default: layers.group_norm,
    aten.instance_norm.default: layers.instance_norm,
    aten.max_pool2d.default: pools.max_pool,
    aten.avg_pool2d.default: pools.avg_pool,
    aten.adaptive_avg_pool2d.default: pools.adaptive_avg_pool,
    aten.upsample_nearest2d.vec: pools.resize_nearest,
    aten.upsample_bilinear2d.vec: pools.resize_bilinear,
    aten.upsample_bicubic2d.vec: pools.resize_bicubic,
    aten.adaptive_max_pool2d.default: pools.adaptive_max_pool,
    # nonlinearities
    aten.relu.default: arithmetic.plain("Relu"),
    aten.relu6.default: lambda b, node, x: arithmetic.clamp(b, node, x, 0.0, 6.0),
    aten.hardtanh.default: arithmetic.clamp,
    aten.clamp.default: arithmetic.clamp,
    aten.clamp_min.default: arithmetic.clamp,
    aten.clamp_max.default: lambda b, node, x, high: arithmetic.clamp(b, node, x, None, high),
    aten.hardswish.default: arithmetic.plain("HardSwish"),
    aten.hardsigmoid.default: arithmetic.plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.silu.default: arithmetic.silu,
    aten.sigmoid.default: arithmetic.plain("Sigmoid"),
    aten.gelu.default: arithmetic.gelu,
    aten.mish.default: arithmetic.plain("Mish"),
    aten.elu.default: lambda b, node, x, alpha, *_: b.op("Elu", x, name=node.name, alpha=float(alpha)),
    aten.leaky_relu.default: arithmetic.leaky_relu,
    aten.prelu.default: arithmetic.prelu,
    aten.softplus.default: arithmetic.plain("Softplus"),
    aten.selu.default: arithmetic.plain("Selu"),
    aten.celu.default: lambda b, node, x, alpha: b.op("Celu", x, name=node.name, alpha=float(alpha)),
    aten.glu.default: arithmetic.glu,
    aten.log_sigmoid.default: arithmetic.log_sigmoid,
    aten.tanh.default: arithmetic.plain("Tanh"),
    aten.softmax.int: arithmetic.softmax,
    aten.log_softmax.int: arithmetic.log_softmax,
    # arithmetic
    aten.add.Tensor: arithmetic.binary("Add"),
    aten.sub.Tensor: arithmetic.binary("Sub"),
    aten.mul.Tensor: arithmetic.binary("Mul"),
    aten.div.Tensor: arithmetic.binary("Div"),
    aten.pow.Tensor_Scalar: arithmetic.binary("Pow"),
    aten.maximum.default: arithmetic.binary("Max"),
    aten.minimum.default: arithmetic.binary("Min"),
    aten.matmul.default: arithmetic.binary("MatMul"),
    aten.bmm.default: arithmetic.binary("MatMul"),
    aten.einsum.default: arithmetic.einsum,
    aten.rsub.Scalar: arithmetic.reversed_sub,
    aten.pow.Tensor_Tensor: arithmetic.binary("Pow"),
    **{
        operation: arithmetic.compared(kind)
        for kind, operations in {
            "Greater": (aten.gt.Scalar, aten.gt.Tensor),
            "GreaterOrEqual": (aten.ge.Scalar, aten.ge.Tensor),
            "Less": (aten.lt.Scalar, aten.lt.Tensor),
            "LessOrEqual": (aten.le.Scalar, aten.le.Tensor),
        }.items()
        for operation in operations
    },
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther), arithmetic.where),
    aten.masked_fill.Scalar: lambda b, node, x, mask, value: arithmetic.where(b, node, mask, value, x),
    aten.to.dtype: arithmetic.cast,
    aten.sign.default: arithmetic.plain("Sign"),
    aten.floor.default: arithmetic.plain("Floor"),
    aten.ceil.default: arithmetic.plain("Ceil"),
    aten.scaled_dot_product_attention.default: arithmetic.attention,
    aten.exp.default: arithmetic.plain("Exp"),
    aten.log.default: arithmetic.plain("Log"),
    aten.sqrt.default: arithmetic.plain("Sqrt"),
    aten.rsqrt.default: arithmetic.rsqrt,
    aten.erf.default: arithmetic.plain("Erf"),
    aten.abs.default: arithmetic.plain("Abs"),
    aten.neg.default: arithmetic.plain("Neg"),
    aten.sin.default: arithmetic.plain("Sin"),
    aten.cos.default: arithmetic.plain("Cos"),
    aten.reciprocal.default: arithmetic.plain("Reciprocal"),
    aten.square.default: lambda b, node, x: b.op("Mul", x, x, name=node.name),
    aten.mean.dim: arithmetic.reduction("ReduceMean"),
    aten.sum.dim_IntList: arithmetic.reduction("ReduceSum"),
    aten.amax.default: arithmetic.reduction("ReduceMax"),
    aten.amin.default: arithmetic.reduction("ReduceMin"),
    aten.max.dim: arithmetic.extreme("ReduceMax"),
    aten.min.dim: arithmetic.extreme("ReduceMin"),
    aten.linalg_vector_norm.default: arithmetic.vector_norm,
    aten.var.dim: lambda b, node, x, dim, unbiased, keepdim: arithmetic.variance(
        b, node, x, dim, int(unbiased), keepdim
    ),
    aten.var.correction: arithmetic.variance,
    aten.addcmul.default: arithmetic.addcmul,
    # shape
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten.reshape_as.default,
            aten.view_as.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
        ),
        shapes.reshape,
    ),
    aten.permute.default: shapes.permute,
    aten.transpose.int: shapes.transpose,
    aten.pad.default: shapes.pad,
    aten.constant_pad_nd.default: shapes.pad,
    aten.slice.Tensor: shapes.slice,
    aten.roll.default: shapes.roll,
    aten.select.int: shapes.select,
    aten.index.Tensor: shapes.index,
    aten.unfold.default: shapes.unfold,
    aten.im2col.default: shapes.patches,
    aten.chunk.default: shapes.split,
    aten.split.Tensor: shapes.split,
    aten.split_with_sizes.default: shapes.split,
    aten.unbind.int: shapes.unbind,
    aten.cat.default: shapes.cat,
    aten.stack.default: shapes.stack,
    aten.repeat_interleave.self_int: shapes.repeat_interleave,
    aten.expand.default: shapes.expand,
    aten.expand_as.default: shapes.expand,
    aten.pixel_shuffle.default: shapes.pixel_shuffle,
    aten.pixel_unshuffle.default: shapes.pixel_unshuffle,
    aten.repeat.default: shapes.repeat,
    aten.flip.default: shapes.flip,
    aten.contiguous.default: shapes.identity,
    aten.clone.default: shapes.identity,
}


def emit(b: Builder, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What `node` computes, written into `b`.

    Raises:
        UsageError: the operation is not in the table, or one of its arguments has no ONNX form.
    """
    emitter = EMITTERS.get(node.target)
    if emitter is None:
        raise UsageError(
            f"The model uses the operation {node.target} (node {node.name}), which zsq cannot export to ONNX."
            " Replace it in the model by supported ones (convolution, linear, norms, pools, usual "
            "nonlinearities, arithmetic and reshapes), or use the run in PyTorch: zsq.load_run(RUN).student."
        )
    return emitter(b, node, *_arguments(node, values))


def _arguments(node: fx.Node, values: dict[fx.Node, Any]) -> list[Any]:
    """Arguments in the order of the schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.get)
    found = list(args)
    for argument in node.target._schema.arguments[len(found) :]:
        found.append(kwargs[argument.name] if argument.name in kwargs else argument.default_value)
    return [None if isinstance(v, float) and math.isinf(v) and node.target in _BOUNDED else v for v in found]


_BOUNDED = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default)
