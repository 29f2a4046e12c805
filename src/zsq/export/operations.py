"""Which ONNX operators stand for which ATen operation: one table."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from zsq.errors import UsageError
from zsq.export import layers, shapes
from zsq.export.builder import Builder, as_integers
from zsq.graph.nodes import aten

if TYPE_CHECKING:
    import onnx_ir as ir

# An emitter takes the builder, the node, and the operation's arguments in the order of its schema, defaults
# filled in: values for tensors, plain numbers and lists for the rest.
Emitter = Callable[..., Any]


def _plain(kind: str, **attributes: Any) -> Emitter:
    """An operator of one tensor."""
    return lambda b, node, x, *_: b.op(kind, x, name=node.name, **attributes)


def _value(b: Builder, x: Any) -> "ir.Value":
    return b.number(x) if isinstance(x, (int, float)) else x


def _binary(kind: str) -> Emitter:
    """Addition and the like, of tensors or numbers; `alpha` multiplies the second operand."""

    def emit(b: Builder, node: fx.Node, x: Any, other: Any, alpha: float = 1, *_: Any) -> Any:
        if kind in ("Add", "Sub") and alpha != 1:
            other = (
                b.op("Mul", other, b.number(alpha), name=f"{node.name}.scaled")
                if not isinstance(other, (int, float))
                else other * alpha
            )
        return b.op(kind, _value(b, x), _value(b, other), name=node.name)

    return emit


def _reduction(kind: str) -> Emitter:
    def emit(b: Builder, node: fx.Node, x: Any, dim: Any = None, keepdim: bool = False, *_: Any) -> Any:
        axes = b.integers(as_integers(dim)) if dim not in (None, []) else None
        return b.op(kind, x, axes, name=node.name, keepdims=int(keepdim))

    return emit


def _vector_norm(
    b: Builder, node: fx.Node, x: Any, order: float = 2, dim: Any = None, keepdim: bool = False, *_: Any
) -> Any:
    """Norms of order 1, 2 and infinity."""
    if math.isinf(order) and order > 0:
        x, kind = b.op("Abs", x, name=f"{node.name}.abs"), "ReduceMax"
    elif order in (1, 2):
        kind = f"ReduceL{int(order)}"
    else:
        raise UsageError(
            f"The norm {node.name} is of order {order}, which cannot be exported; 1, 2, inf can."
        )
    return _reduction(kind)(b, node, x, dim, keepdim)


def _variance(b: Builder, node: fx.Node, x: Any, dim: Any, correction: Any, keepdim: bool) -> Any:
    """Mean square of what a tensor is above its mean, with `correction` fewer degrees of freedom."""
    shape = node.args[0].meta["shape"]  # type: ignore[union-attr]
    sizes = [shape[axis] for axis in (as_integers(dim) if dim not in (None, []) else range(len(shape)))]
    if None in sizes:
        raise UsageError(f"The variance {node.name} is over the batch, which cannot be exported.")
    count, axes = math.prod(sizes), b.integers(as_integers(dim))
    mean = b.op("ReduceMean", x, axes, name=f"{node.name}.mean", keepdims=1)
    above = b.op("Sub", x, mean, name=f"{node.name}.above")
    square = b.op("Mul", above, above, name=f"{node.name}.square")
    biased = b.op("ReduceMean", square, axes, name=f"{node.name}.biased", keepdims=int(keepdim))
    freedom = count - (1 if correction is None else float(correction))
    return b.op("Mul", biased, b.number(count / freedom), name=node.name)


def _compared(kind: str) -> Emitter:
    """Truth values of a tensor beside another or a number."""
    return lambda b, node, x, other: b.op(kind, x, _value(b, other), name=node.name)


def _extreme(kind: str) -> Emitter:
    """The largest or smallest of an axis; where it is, is left out."""
    reduce = _reduction(kind)
    return lambda b, node, x, dim, keepdim=False: (reduce(b, node, x, dim, keepdim), None)


def _where(b: Builder, node: fx.Node, condition: Any, x: Any, other: Any) -> Any:
    return b.op("Where", condition, _value(b, x), _value(b, other), name=node.name)


def _masked_fill(b: Builder, node: fx.Node, x: Any, mask: Any, value: Any) -> Any:
    return b.op("Where", mask, _value(b, value), x, name=node.name)


def _cast(b: Builder, node: fx.Node, x: Any, dtype: torch.dtype, *_: Any) -> Any:
    kinds = {torch.float32: "FLOAT", torch.int64: "INT64", torch.bool: "BOOL"}
    if dtype not in kinds:
        raise UsageError(
            f"The operation {node.name} makes numbers of type {dtype}, which cannot be exported."
        )
    return b.cast(x, kinds[dtype], node.name)


def _glu(b: Builder, node: fx.Node, x: Any, dim: int = -1) -> Any:
    half = b.integers([node.meta["shape"][dim]] * 2)
    names = [f"{node.name}.value", f"{node.name}.gate"]
    value, gate = b.ops("Split", x, half, names=names, axis=dim)
    return b.op("Mul", value, b.op("Sigmoid", gate, name=f"{node.name}.sigmoid"), name=node.name)


def _log_sigmoid(b: Builder, node: fx.Node, x: Any) -> Any:
    soft = b.op("Softplus", b.op("Neg", x, name=f"{node.name}.negative"), name=f"{node.name}.softplus")
    return b.op("Neg", soft, name=node.name)


def _reversed_sub(b: Builder, node: fx.Node, x: Any, other: Any, alpha: float = 1) -> Any:
    scaled = x if alpha == 1 else b.op("Mul", x, b.number(alpha), name=f"{node.name}.scaled")
    return b.op("Sub", _value(b, other), scaled, name=node.name)


def _einsum(b: Builder, node: fx.Node, equation: str, tensors: Any, *_: Any) -> Any:
    return b.op("Einsum", *tensors, name=node.name, equation=equation)


def _addcmul(b: Builder, node: fx.Node, x: Any, first: Any, second: Any, value: float = 1) -> Any:
    """x + value first second."""
    product = b.op("Mul", first, second, name=f"{node.name}.product")
    if value != 1:
        product = b.op("Mul", product, b.number(value), name=f"{node.name}.scaled")
    return b.op("Add", x, product, name=node.name)


def _clamp(b: Builder, node: fx.Node, x: Any, low: Any = None, high: Any = None) -> Any:
    """A Clip; in an exact file Max and Min, since ONNX Runtime does not load a Clip before 4-bit codes."""
    if not b.exact:
        bounds = [None if bound is None else b.number(bound) for bound in (low, high)]
        return b.op("Clip", x, *(bounds[:1] if bounds[1] is None else bounds), name=node.name)
    if low is not None:
        x = (
            b.op("Relu", x, name=f"{node.name}.low")
            if low == 0
            else b.op("Max", x, b.number(low), name=f"{node.name}.low")
        )
    return x if high is None else b.op("Min", x, b.number(high), name=node.name)


def _gelu(b: Builder, node: fx.Node, x: Any, approximate: str) -> Any:
    return b.op("Gelu", x, name=node.name, approximate=approximate)


def _silu(b: Builder, node: fx.Node, x: Any) -> Any:
    return b.op("Mul", x, b.op("Sigmoid", x, name=f"{node.name}.gate"), name=node.name)


def _rsqrt(b: Builder, node: fx.Node, x: Any) -> Any:
    return b.op("Reciprocal", b.op("Sqrt", x, name=f"{node.name}.root"), name=node.name)


def _leaky_relu(b: Builder, node: fx.Node, x: Any, slope: float) -> Any:
    return b.op("LeakyRelu", x, name=node.name, alpha=float(slope))


def _prelu(b: Builder, node: fx.Node, x: Any, slope: Any) -> Any:
    rank = len(node.meta["shape"])
    if rank > 2:
        slope = b.op("Reshape", slope, b.integers([-1] + [1] * (rank - 2)), name=f"{node.name}.slope")
    return b.op("PRelu", x, slope, name=node.name)


def _softmax(b: Builder, node: fx.Node, x: Any, dim: int, *_: Any) -> Any:
    return b.op("Softmax", x, name=node.name, axis=dim)


def _log_softmax(b: Builder, node: fx.Node, x: Any, dim: int, *_: Any) -> Any:
    return b.op("LogSoftmax", x, name=node.name, axis=dim)


def _attention(
    b: Builder,
    node: fx.Node,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    drop: float,
    causal: bool,
    scale: Any,
    grouped: bool,
) -> Any:
    """softmax(q k^T scale + mask) v over the last two axes."""
    shape = node.args[0].meta["shape"]  # type: ignore[union-attr]
    if causal or grouped:
        raise UsageError(f"The attention {node.name} is causal or grouped, which cannot be exported.")
    order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    scaled = b.op(
        "Mul", q, b.number(shape[-1] ** -0.5 if scale is None else scale), name=f"{node.name}.query"
    )
    turned = b.op("Transpose", k, name=f"{node.name}.key", perm=order)
    scores = b.op("MatMul", scaled, turned, name=f"{node.name}.scores")
    if mask is not None:
        scores = b.op("Add", scores, mask, name=f"{node.name}.masked")
    weights = b.op("Softmax", scores, name=f"{node.name}.weights", axis=-1)
    return b.op("MatMul", weights, v, name=node.name)


EMITTERS: dict[Any, Emitter] = {
    # layers, norms, pools (layers.py)
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
    aten.max_pool2d.default: layers.max_pool,
    aten.avg_pool2d.default: layers.avg_pool,
    aten.adaptive_avg_pool2d.default: layers.adaptive_avg_pool,
    aten.upsample_nearest2d.vec: layers.resize_nearest,
    aten.upsample_bilinear2d.vec: layers.resize_bilinear,
    aten.upsample_bicubic2d.vec: layers.resize_bicubic,
    aten.adaptive_max_pool2d.default: layers.adaptive_max_pool,
    # nonlinearities
    aten.relu.default: _plain("Relu"),
    aten.relu6.default: lambda b, node, x: _clamp(b, node, x, 0.0, 6.0),
    aten.hardtanh.default: _clamp,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda b, node, x, high: _clamp(b, node, x, None, high),
    aten.hardswish.default: _plain("HardSwish"),
    aten.hardsigmoid.default: _plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.silu.default: _silu,
    aten.sigmoid.default: _plain("Sigmoid"),
    aten.gelu.default: _gelu,
    aten.mish.default: _plain("Mish"),
    aten.elu.default: lambda b, node, x, alpha, *_: b.op("Elu", x, name=node.name, alpha=float(alpha)),
    aten.leaky_relu.default: _leaky_relu,
    aten.prelu.default: _prelu,
    aten.softplus.default: _plain("Softplus"),
    aten.selu.default: _plain("Selu"),
    aten.celu.default: lambda b, node, x, alpha: b.op("Celu", x, name=node.name, alpha=float(alpha)),
    aten.glu.default: _glu,
    aten.log_sigmoid.default: _log_sigmoid,
    aten.tanh.default: _plain("Tanh"),
    aten.softmax.int: _softmax,
    aten.log_softmax.int: _log_softmax,
    # arithmetic
    aten.add.Tensor: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.div.Tensor: _binary("Div"),
    aten.pow.Tensor_Scalar: _binary("Pow"),
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.matmul.default: _binary("MatMul"),
    aten.bmm.default: _binary("MatMul"),
    aten.einsum.default: _einsum,
    aten.rsub.Scalar: _reversed_sub,
    aten.pow.Tensor_Tensor: _binary("Pow"),
    **{
        operation: _compared(kind)
        for kind, operations in {
            "Greater": (aten.gt.Scalar, aten.gt.Tensor),
            "GreaterOrEqual": (aten.ge.Scalar, aten.ge.Tensor),
            "Less": (aten.lt.Scalar, aten.lt.Tensor),
            "LessOrEqual": (aten.le.Scalar, aten.le.Tensor),
        }.items()
        for operation in operations
    },
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther), _where),
    aten.masked_fill.Scalar: _masked_fill,
    aten.to.dtype: _cast,
    aten.sign.default: _plain("Sign"),
    aten.floor.default: _plain("Floor"),
    aten.ceil.default: _plain("Ceil"),
    aten.scaled_dot_product_attention.default: _attention,
    aten.exp.default: _plain("Exp"),
    aten.log.default: _plain("Log"),
    aten.sqrt.default: _plain("Sqrt"),
    aten.rsqrt.default: _rsqrt,
    aten.erf.default: _plain("Erf"),
    aten.abs.default: _plain("Abs"),
    aten.neg.default: _plain("Neg"),
    aten.sin.default: _plain("Sin"),
    aten.cos.default: _plain("Cos"),
    aten.reciprocal.default: _plain("Reciprocal"),
    aten.square.default: lambda b, node, x: b.op("Mul", x, x, name=node.name),
    aten.mean.dim: _reduction("ReduceMean"),
    aten.sum.dim_IntList: _reduction("ReduceSum"),
    aten.amax.default: _reduction("ReduceMax"),
    aten.amin.default: _reduction("ReduceMin"),
    aten.max.dim: _extreme("ReduceMax"),
    aten.min.dim: _extreme("ReduceMin"),
    aten.linalg_vector_norm.default: _vector_norm,
    aten.var.dim: lambda b, node, x, dim, unbiased, keepdim: _variance(
        b, node, x, dim, int(unbiased), keepdim
    ),
    aten.var.correction: _variance,
    aten.addcmul.default: _addcmul,
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
