"""ONNX for ATen's arithmetic, nonlinearities and reductions."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from zsq.errors import UsageError
from zsq.export.builder import Builder, as_integers

if TYPE_CHECKING:
    import onnx_ir as ir

# An emitter takes the builder, the node, and the operation's arguments in the order of its schema, defaults
# filled in: values for tensors, plain numbers and lists for the rest.
Emitter = Callable[..., Any]


def plain(kind: str, **attributes: Any) -> Emitter:
    """An operator of one tensor."""
    return lambda b, node, x, *_: b.op(kind, x, name=node.name, **attributes)


def as_value(b: Builder, x: Any) -> "ir.Value":
    """A tensor, or a number as one."""
    return b.number(x) if isinstance(x, (int, float)) else x


def binary(kind: str) -> Emitter:
    """Addition and the like, of tensors or numbers; `alpha` multiplies the second operand."""

    def emit(b: Builder, node: fx.Node, x: Any, other: Any, alpha: float = 1, *_: Any) -> Any:
        if kind in ("Add", "Sub") and alpha != 1:
            other = (
                b.op("Mul", other, b.number(alpha), name=f"{node.name}.scaled")
                if not isinstance(other, (int, float))
                else other * alpha
            )
        return b.op(kind, as_value(b, x), as_value(b, other), name=node.name)

    return emit


def reduction(kind: str) -> Emitter:
    """A mean, sum or extreme over some axes, or all."""

    def emit(b: Builder, node: fx.Node, x: Any, dim: Any = None, keepdim: bool = False, *_: Any) -> Any:
        axes = b.integers(as_integers(dim)) if dim not in (None, []) else None
        return b.op(kind, x, axes, name=node.name, keepdims=int(keepdim))

    return emit


def vector_norm(
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
    return reduction(kind)(b, node, x, dim, keepdim)


def variance(b: Builder, node: fx.Node, x: Any, dim: Any, correction: Any, keepdim: bool) -> Any:
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


def compared(kind: str) -> Emitter:
    """Truth values of a tensor beside another or a number."""
    return lambda b, node, x, other: b.op(kind, x, as_value(b, other), name=node.name)


def extreme(kind: str) -> Emitter:
    """The largest or smallest of an axis; where it is, is left out."""
    reduce = reduction(kind)
    return lambda b, node, x, dim, keepdim=False: (reduce(b, node, x, dim, keepdim), None)


def where(b: Builder, node: fx.Node, condition: Any, x: Any, other: Any) -> Any:
    """aten.where, of tensors or numbers."""
    return b.op("Where", condition, as_value(b, x), as_value(b, other), name=node.name)


def cast(b: Builder, node: fx.Node, x: Any, dtype: torch.dtype, *_: Any) -> Any:
    """aten.to another type: float32, int64 or truth values."""
    kinds = {torch.float32: "FLOAT", torch.int64: "INT64", torch.bool: "BOOL"}
    if dtype not in kinds:
        raise UsageError(
            f"The operation {node.name} makes numbers of type {dtype}, which cannot be exported."
        )
    return b.cast(x, kinds[dtype], node.name)


def glu(b: Builder, node: fx.Node, x: Any, dim: int = -1) -> Any:
    """aten.glu."""
    half = b.integers([node.meta["shape"][dim]] * 2)
    names = [f"{node.name}.value", f"{node.name}.gate"]
    value, gate = b.ops("Split", x, half, names=names, axis=dim)
    return b.op("Mul", value, b.op("Sigmoid", gate, name=f"{node.name}.sigmoid"), name=node.name)


def log_sigmoid(b: Builder, node: fx.Node, x: Any) -> Any:
    """aten.log_sigmoid: -softplus(-x)."""
    soft = b.op("Softplus", b.op("Neg", x, name=f"{node.name}.negative"), name=f"{node.name}.softplus")
    return b.op("Neg", soft, name=node.name)


def reversed_sub(b: Builder, node: fx.Node, x: Any, other: Any, alpha: float = 1) -> Any:
    """aten.rsub: other - alpha x."""
    scaled = x if alpha == 1 else b.op("Mul", x, b.number(alpha), name=f"{node.name}.scaled")
    return b.op("Sub", as_value(b, other), scaled, name=node.name)


def einsum(b: Builder, node: fx.Node, equation: str, tensors: Any, *_: Any) -> Any:
    """aten.einsum."""
    return b.op("Einsum", *tensors, name=node.name, equation=equation)


def addcmul(b: Builder, node: fx.Node, x: Any, first: Any, second: Any, value: float = 1) -> Any:
    """x + value first second."""
    product = b.op("Mul", first, second, name=f"{node.name}.product")
    if value != 1:
        product = b.op("Mul", product, b.number(value), name=f"{node.name}.scaled")
    return b.op("Add", x, product, name=node.name)


def clamp(b: Builder, node: fx.Node, x: Any, low: Any = None, high: Any = None) -> Any:
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


def gelu(b: Builder, node: fx.Node, x: Any, approximate: str) -> Any:
    """aten.gelu."""
    return b.op("Gelu", x, name=node.name, approximate=approximate)


def silu(b: Builder, node: fx.Node, x: Any) -> Any:
    """aten.silu: x sigmoid(x)."""
    return b.op("Mul", x, b.op("Sigmoid", x, name=f"{node.name}.gate"), name=node.name)


def rsqrt(b: Builder, node: fx.Node, x: Any) -> Any:
    """aten.rsqrt."""
    return b.op("Reciprocal", b.op("Sqrt", x, name=f"{node.name}.root"), name=node.name)


def leaky_relu(b: Builder, node: fx.Node, x: Any, slope: float) -> Any:
    """aten.leaky_relu."""
    return b.op("LeakyRelu", x, name=node.name, alpha=float(slope))


def prelu(b: Builder, node: fx.Node, x: Any, slope: Any) -> Any:
    """aten.prelu."""
    rank = len(node.meta["shape"])
    if rank > 2:
        slope = b.op("Reshape", slope, b.integers([-1] + [1] * (rank - 2)), name=f"{node.name}.slope")
    return b.op("PRelu", x, slope, name=node.name)


def softmax(b: Builder, node: fx.Node, x: Any, dim: int, *_: Any) -> Any:
    """aten.softmax."""
    return b.op("Softmax", x, name=node.name, axis=dim)


def log_softmax(b: Builder, node: fx.Node, x: Any, dim: int, *_: Any) -> Any:
    """aten.log_softmax."""
    return b.op("LogSoftmax", x, name=node.name, axis=dim)


def attention(
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
