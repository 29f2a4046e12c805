"""Writing an ONNX graph node by node with onnx_ir."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zsq.errors import import_extra
from zsq.export.codes import StoredCodes

if TYPE_CHECKING:
    import onnx_ir as ir

EXTRA = "onnx"


class Builder:
    """Nodes and initializers of a graph in the making.

    Attributes:
        exact: whether the engine is to compute in float between the quantizers and must be kept from fusing
            them with operators (it has none for less than 8 bits); else 8-bit fusions are wanted.
        integer_biases: whether biases of linear layers are stored as 32-bit integers where they are some.
        quantized: (value, quantizer) -> its dequantized value, so that readers share one.
    """

    def __init__(self, *, exact: bool, integer_biases: bool = False) -> None:
        self._ir: Any = import_extra("onnx_ir", EXTRA)
        self._types: Any = import_extra("ml_dtypes", EXTRA)
        self.exact, self.integer_biases = exact, integer_biases
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.quantized: dict[tuple[str, str], ir.Value] = {}
        self._names: set[str] = set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def unique(self, name: str) -> str:
        """`name`, or with a number after it if it is taken."""
        found, count = name, 1
        while found in self._names:
            count += 1
            found = f"{name}_{count}"
        self._names.add(found)
        return found

    def op(self, kind: str, *inputs: "ir.Value | None", name: str, **attributes: Any) -> "ir.Value":
        """A node with one output, which is called `name`."""
        value: ir.Value = self.ops(kind, *inputs, names=[name], **attributes)[0]
        return value

    def ops(
        self, kind: str, *inputs: "ir.Value | None", names: Sequence[str], **attributes: Any
    ) -> "list[ir.Value]":
        """A node with several outputs."""
        outputs = [self._ir.Value(name=self.unique(name)) for name in names]
        node = self._ir.node(
            kind,
            inputs=list(inputs),
            attributes=attributes,
            outputs=outputs,
            name=f"{kind}_{outputs[0].name}",
        )
        self.nodes.append(node)
        return outputs

    def tensor(self, value: Tensor, name: str) -> "ir.Value":
        """A stored tensor: float32, int64 or truth values."""
        array = value.detach().cpu().contiguous().numpy()
        kind = np.float32 if value.is_floating_point() else np.int64
        return self._store(array.astype(array.dtype if value.dtype == torch.bool else kind), name)

    def cast(self, x: "ir.Value", kind: str, name: str) -> "ir.Value":
        """Numbers of another type, named as ONNX names it."""
        return self.op("Cast", x, name=name, to=int(self._ir.DataType[kind]))

    def number(self, value: float) -> "ir.Value":
        """A float scalar."""
        return self._constant(np.float32(value))

    def integers(self, values: int | Sequence[int]) -> "ir.Value":
        """An int64 scalar or vector."""
        return self._constant(np.asarray(values, dtype=np.int64))

    def _constant(self, value: Any) -> "ir.Value":
        array = np.asarray(value)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._store(array, "constant")
        return self._constants[key]

    def codes(self, stored: Tensor, like: StoredCodes, name: str) -> "ir.Value":
        """Integers packed at the width of their container; two 4-bit codes take a byte."""
        kind = getattr(self._types, like.type_name.lower(), None) or np.dtype(like.type_name.lower())
        array = stored.cpu().contiguous().numpy().astype(np.int8 if like.signed else np.uint8).astype(kind)
        return self._store(array, name, like.type_name)

    def _store(self, array: Any, name: str, type_name: str | None = None) -> "ir.Value":
        name = self.unique(name)
        data_type = self._ir.DataType[type_name] if type_name else None
        tensor = self._ir.tensor(array, dtype=data_type, name=name)
        value: ir.Value = self._ir.Value(
            name=name,
            shape=self._ir.Shape(array.shape),
            type=self._ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.initializers[name] = value
        return value

    def dequantized_weight(self, stored: StoredCodes, scale: Tensor, axis: int, name: str) -> "ir.Value":
        """A weight from its codes, with one scale and zero point an index of `axis`."""
        return self.op(
            "DequantizeLinear",
            self.codes(stored.codes, stored, f"{name}.codes"),
            self.tensor(scale / stored.finer, f"{name}.scale"),
            self.codes(stored.zero_point, stored, f"{name}.zero_point"),
            name=f"{name}.weight",
            axis=axis,
        )

    def bias(self, value: "ir.Value", step: Tensor, name: str) -> "ir.Value":
        """A bias (C,) in integers and steps (C,), if it is one within float32's rounding; else as it is."""
        stored = value.const_value
        if stored is None:
            return value
        steps = torch.from_numpy(stored.numpy()).double() / step.double()
        codes = steps.round()
        exact = (steps - codes).abs() <= 0.01 + codes.abs() * 2.0**-22
        if not bool(exact.all()) or bool(codes.abs().max() >= 2**31):
            return value
        return self.op(
            "DequantizeLinear",
            self._store(codes.numpy().astype(np.int32), f"{name}.codes", "INT32"),
            self.tensor(step.float(), f"{name}.step"),
            name=name,
            axis=0,
        )

    def quantized_activation(
        self, x: "ir.Value", stored: StoredCodes, scale: Tensor, name: str
    ) -> "ir.Value":
        """`x` through its quantizer; codes that the container has but the quantizer has not are clipped.

        In an `exact` file the clip is there even if the container clips by itself: ONNX Runtime 1.31 drops a
        ReLU before a 4-bit QuantizeLinear whatever its zero point, does not load a Clip before one, turns the
        bias of a convolution that is followed by one into integers, and fuses operators that have no 4- or
        2-bit form. It is a Min, since a Clip would be merged.
        """
        key = (str(x.name), name)
        if key not in self.quantized:
            step = self.tensor(scale.reshape(()), f"{name}.scale")
            zero = self.codes(stored.zero_point.reshape(()), stored, f"{name}.zero_point")
            lowest, highest = (float((c - stored.zero_point) * scale) for c in stored.codes)
            smallest, largest = stored.limits
            if self.exact or int(stored.codes[1]) < largest:
                x = self.op("Min", x, self.number(highest), name=f"{name}.below")
            if int(stored.codes[0]) > smallest:
                x = self.op("Max", x, self.number(lowest), name=f"{name}.above")
            codes = self.op("QuantizeLinear", x, step, zero, name=f"{name}.codes")
            self.quantized[key] = self.op("DequantizeLinear", codes, step, zero, name=f"{name}.values")
        return self.quantized[key]


def as_integers(value: Any) -> list[int]:
    """A dimension argument of an ATen operation as a list."""
    return [int(v) for v in value] if isinstance(value, (list, tuple, torch.Size)) else [int(value)]
