"""A run as a torch.export program: integer weights, quantizers as PyTorch's own operators."""

import importlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq.errors import JobError
from zsq.export.account import VERIFIED, account_of, write_with_account
from zsq.export.codes import stored_activation, stored_weight
from zsq.export.integer import quantize_for_fusion, share_quantizers
from zsq.export.onnx import metadata_of
from zsq.export.prepare import prepared
from zsq.export.targets import Target
from zsq.export.verify import NUM_IMAGES, OutputDifference, Reference, differences, run_in_chunks
from zsq.files import check_free
from zsq.graph.capture import quiet
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from zsq.run import Run, load_run

# It registers quantized_decomposed, the operators that ExecuTorch and inductor know quantizers by.
OPERATORS = "torch.ao.quantization.fx._decomposed"
BYTES = Target(name="pt2", widths=(8,))
LOWEST, HIGHEST = -128, 127


@dataclass(frozen=True)
class Program:
    """A written program.

    Attributes:
        path: of the file.
        settings: of the file that tells how it compared (`path` with .json after it).
        size: its bytes.
        engine: that it was compared in, and its version.
        num_images: of the run, on which it was compared with the student.
        outputs: how.
        notes: what has to be known, in sentences.
        outside: of an ExecuTorch program, operators that XNNPACK did not take; ExecuTorch's own kernels
            compute them.
    """

    path: Path
    settings: Path
    size: int
    engine: str
    num_images: int
    outputs: tuple[OutputDifference, ...]
    notes: tuple[str, ...]
    outside: tuple[str, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """As a dictionary."""
        return {
            "file": self.path.name,
            "bytes": self.size,
            "engine": self.engine,
            VERIFIED: {
                "num_images": self.num_images,
                "outputs": [asdict(d) for d in self.outputs],
            },
            **({} if self.outside is None else {"outside_xnnpack": list(self.outside)}),
            "notes": list(self.notes),
        }


def export_pt2(run: Run | str | Path, path: str | Path, *, force: bool = False) -> Program:
    """Write a run as a torch.export program, after it computed the same as the student.

    Weights are bytes with a scale and a zero point a channel (codes of fewer bits in bytes too), activations
    signed codes of their true width in bytes; both in `quantized_decomposed` operators, with limits -128..127
    declared for weights, and quantizers directly before linear layers: the form that ExecuTorch's XNNPACK
    lowering (`export_executorch`) takes whole if every layer's result is quantized (placement "engine").

    `torch.export.load` reads the file once `torch.ao.quantization.fx._decomposed` is imported; zsq is not
    needed.

    Args:
        run: a Run, or the folder of one.
        path: file to write; beside it goes `path`.json with the verification.
        force: replace it if it exists.

    Raises:
        UsageError: a file that exists already, a damaged run.
        JobError: the program does not compute what the student computes, or cannot be written.
    """
    file = Path(path)
    settings = account_of(file)
    check_free([file, settings], force=force)
    loaded = run if isinstance(run, Run) else load_run(run)
    reference, lowered, notes = prepared_for_operators(loaded)
    program = exported_program(with_operators(lowered), tuple(loaded.images.shape[1:]))
    buffer = io.BytesIO()
    about = metadata_of(loaded, BYTES, "int8")
    torch.export.save(program, buffer, extra_files={"zsq.json": json.dumps(about)})
    content = buffer.getvalue()
    again = torch.export.load(io.BytesIO(content)).module()
    found = agreeing("The program", run_in_chunks(again, reference.images), reference, fault="zsq")
    notes.append(f"to load it: import {OPERATORS}, then torch.export.load")
    engine = f"torch {torch.__version__}"
    result = Program(file, settings, len(content), engine, len(reference.images), found, tuple(notes))
    write_with_account(file, content, {**about, **result.to_json()})
    return result


def prepared_for_operators(run: Run) -> tuple[Reference, fx.GraphModule, list[str]]:
    """What a run's program is compared with, the student that it is made of, and what was changed.

    The student has quantizers where integers want them, each called once a tensor; `with_operators` is next.

    Raises:
        UsageError: a damaged run.
    """
    student, notes = prepared(run.student, run.images, BYTES)
    reference = Reference(student, run.images[:NUM_IMAGES])
    lowered, _ = prepared(run.student, run.images, BYTES)
    quantize_for_fusion(lowered)
    share_quantizers(lowered)
    return reference, lowered, notes


def agreeing(
    what: str, outputs: Sequence[Tensor], reference: Reference, *, fault: str
) -> tuple[OutputDifference, ...]:
    """How a program's outputs compare with the student's.

    Raises:
        JobError: an output is another; the text calls the program `what` and says whose `fault` it is.
    """
    found = differences([f"output_{i}" for i in range(len(reference.outputs))], outputs, reference)
    wrong = [d for d in found if not d.agrees]
    if wrong:
        raise JobError(
            f"{what} does not compute what the student computes (output {wrong[0].name}: relative error "
            f"{wrong[0].relative_error:.2g}), so it was not written. Use --to onnx, and report the model: "
            f"this is a fault of {fault}."
        )
    return tuple(found)


def exported_program(
    module: fx.GraphModule, size: tuple[int, ...], *, batch: int | None = None
) -> torch.export.ExportedProgram:
    """A module with operators in place of quantizers as a program for `batch` images; None is any number."""
    shapes = ({0: torch.export.Dim("batch", min=1)},) if batch is None else None
    with quiet():
        return torch.export.export(module, (torch.zeros(batch or 2, *size),), dynamic_shapes=shapes)


def with_operators(student: fx.GraphModule) -> fx.GraphModule:
    """A prepared student with operators on stored bytes in place of its quantizers, in place."""
    importlib.import_module(OPERATORS)
    library = torch.ops.quantized_decomposed
    for node in list(student.graph.nodes):
        if node.op != "call_module":
            continue
        quantizer = student.get_submodule(str(node.target))
        with student.graph.inserting_before(node):
            if isinstance(quantizer, WeightQuantizer):
                value = _weight(student, quantizer, library)
            else:
                assert isinstance(quantizer, ActivationQuantizer)
                value = _activation(student, node, quantizer, library)
        node.replace_all_uses_with(value)
        student.graph.erase_node(node)
    student.delete_all_unused_submodules()
    student.graph.lint()
    student.recompile()
    return student


def _weight(student: fx.GraphModule, quantizer: WeightQuantizer, library: Any) -> fx.Node:
    stored = stored_weight(quantizer, BYTES, BYTES.widths)
    tensors = {
        "codes": stored.codes.to(torch.int8),
        "scale": (quantizer.scale / stored.finer).detach(),
        "zero_point": stored.zero_point.long(),
    }
    count = sum(name.startswith("codes_") for name in student._buffers)
    read = [_buffer(student, f"{name}_{count}", tensor) for name, tensor in tensors.items()]
    arguments: tuple[Any, ...] = (*read, quantizer.axis, LOWEST, HIGHEST, torch.int8)
    return student.graph.call_function(library.dequantize_per_channel.default, arguments)


def _activation(
    student: fx.GraphModule, node: fx.Node, quantizer: ActivationQuantizer, library: Any
) -> fx.Node:
    stored, half = stored_activation(quantizer, BYTES, BYTES.widths), 2 ** (quantizer.bits - 1)
    zero_point = int(stored.zero_point) - half
    how: tuple[Any, ...] = (float(quantizer.scale), zero_point, -half, half - 1, torch.int8)
    codes = student.graph.call_function(library.quantize_per_tensor.default, (node.args[0], *how))
    return student.graph.call_function(library.dequantize_per_tensor.default, (codes, *how))


def _buffer(student: nn.Module, name: str, tensor: Tensor) -> fx.Node:
    assert isinstance(student, fx.GraphModule)
    student.register_buffer(name, tensor)
    return student.graph.get_attr(name)
