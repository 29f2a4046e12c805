"""A prepared student as an ONNX model: its graph, node by node, with stored codes."""

import operator
from typing import TYPE_CHECKING, Any

from torch import fx

from zsq._version import __version__
from zsq.errors import JobError, UsageError, one_line
from zsq.export.builder import Builder
from zsq.export.codes import stored_activation, stored_weight
from zsq.export.integer import quantize_for_fusion, reads_codes
from zsq.export.layers import StoredWeight
from zsq.export.operations import emit
from zsq.export.prepare import batch_norm_affine
from zsq.export.targets import IR_VERSIONS, OPSET_OF_TWO_BITS, Target
from zsq.graph.fold import BATCH_NORM
from zsq.graph.nodes import aten
from zsq.graph.tensors import get_tensor
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer

if TYPE_CHECKING:
    import onnx_ir as ir


def lower(
    student: fx.GraphModule, target: Target, widths: tuple[int, ...], metadata: dict[str, str]
) -> "ir.Model":
    """The ONNX model of a prepared student (see `prepared`).

    Args:
        student: with shapes and folded BatchNorms; quantizers may be added to it.
        target: the engine.
        widths: of containers that codes may be stored in.
        metadata: what the file says about itself.

    Raises:
        UsageError: an operation that has no ONNX form.
    """
    import onnx_ir as ir

    codes: dict[str, Any] = {}
    for name, module in student.named_modules():
        if isinstance(module, WeightQuantizer):
            codes[name] = stored_weight(module, target, widths)
        elif isinstance(module, ActivationQuantizer):
            codes[name] = stored_activation(module, target, widths)
    narrowest = min((stored.width for stored in codes.values()), default=8)
    weights_only = bool(codes) and not any(isinstance(m, ActivationQuantizer) for m in student.modules())
    careful = target.rounds_biases and min(widths) < 8 and not reads_codes(student)
    exact = narrowest < 8 or weights_only or careful
    b = Builder(exact=exact, integer_biases=target.rounds_biases and not exact)
    if not b.exact:
        quantize_for_fusion(student)
    values: dict[fx.Node, Any] = {}
    inputs, outputs = [], []
    for node in student.graph.nodes:
        if node.op == "placeholder":
            shape = node.meta["shape"]
            values[node] = ir.Value(
                name=b.unique("images"),
                shape=ir.Shape(["batch", *shape[1:]]),
                type=ir.TensorType(ir.DataType.FLOAT),
            )
            node.meta["value"] = values[node]
            inputs.append(values[node])
        elif node.op == "get_attr":
            values[node] = _constant(b, student, node)
        elif node.op == "call_module":
            values[node] = _quantized(b, student, node, codes[str(node.target)], values)
        elif node.op == "output":
            returned = [values[n] for n in node.all_input_nodes]
            outputs = _outputs(b, ir, returned, [n.meta["shape"] for n in node.all_input_nodes])
        elif node.target is operator.getitem and node.args[0] in values:
            values[node] = values[node.args[0]][node.args[1]]
        elif not _is_size(node):
            if node.target is BATCH_NORM and node.args[4] is not None:
                node.meta["affine"] = batch_norm_affine(student, node)
            values[node] = emit(b, node, values)
    opset = OPSET_OF_TWO_BITS if narrowest < 4 else target.opset
    used = {value.name for node in b.nodes for value in node.inputs if value is not None}
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=b.nodes,
        initializers=[v for name, v in b.initializers.items() if name in used],
        opset_imports={"": opset},
        name="student",
    )
    return ir.Model(
        graph,
        ir_version=IR_VERSIONS[opset],
        producer_name="zsq",
        producer_version=__version__,
        metadata_props=metadata,
    )


def serialized(model: "ir.Model") -> bytes:
    """The bytes of a model, checked by ONNX's own checker.

    Raises:
        JobError: the checker refuses it.
    """
    import onnx
    import onnx_ir as ir

    proto = ir.serde.serialize_model(model)
    content: bytes = proto.SerializeToString()
    try:
        onnx.checker.check_model(content, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = one_line(error)
        raise JobError(
            f"ONNX's checker refuses the exported model, so no file was written: {reason}."
        ) from error
    return content


def _is_size(node: fx.Node) -> bool:
    """A size or arithmetic on sizes: reshapes know their shapes without it."""
    shape = node.meta["shape"]
    return node.target is aten.sym_size.int or not isinstance(shape, (tuple, list))


def _constant(b: Builder, student: fx.GraphModule, node: fx.Node) -> Any:
    tensor = get_tensor(student, str(node.target))
    if tensor.is_complex():
        raise UsageError(f"The tensor {node.target} has type {tensor.dtype}, which cannot be exported.")
    return b.tensor(tensor, str(node.target))


def _quantized(
    b: Builder, student: fx.GraphModule, node: fx.Node, stored: Any, values: dict[fx.Node, Any]
) -> Any:
    name = str(node.target)
    quantizer = student.get_submodule(name)
    if isinstance(quantizer, WeightQuantizer):
        return StoredWeight(stored, quantizer.scale, quantizer.axis, name.removesuffix(".weight_quantizer"))
    assert isinstance(quantizer, ActivationQuantizer)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return b.quantized_activation(values[source], stored, quantizer.scale.detach(), name)


def _outputs(b: Builder, ir: Any, values: list[Any], shapes: list[Any]) -> list[Any]:
    """Named outputs, of float tensors with their shapes; one that something else reads is passed on."""
    names = ["logits"] if len(values) == 1 else [f"output_{i}" for i in range(len(values))]
    found = []
    for name, value, shape in zip(names, values, shapes, strict=True):
        output = b.op("Identity", value, name=name)
        output.shape = ir.Shape(
            ["batch" if size is None and i == 0 else size for i, size in enumerate(shape)]
        )
        output.type = ir.TensorType(ir.DataType.FLOAT)
        found.append(output)
    return found
