"""A run as an ExecuTorch program, lowered to XNNPACK: what phones and boards run."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from zsq.errors import JobError, UsageError, import_extra, one_line
from zsq.export.account import account_of, read_account, spec_in, write_with_account
from zsq.export.engine import EngineFile, check_input
from zsq.export.integer import reads_codes
from zsq.export.onnx import metadata_of
from zsq.export.pt2 import (
    BYTES,
    Program,
    agreeing,
    exported_program,
    prepared_for_operators,
    with_operators,
)
from zsq.files import check_free
from zsq.graph.capture import quiet
from zsq.graph.nodes import LAYERS
from zsq.quant.engine_placement import FUSED
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from zsq.run import Run, load_run

EXTRA = "executorch"
ACTIVATION_BITS = 8  # XNNPACK does not clip codes to fewer: at W4A4 the logits were 5 % off


class ExecuTorchModel(nn.Module):
    """A program in ExecuTorch's runtime: images (N, C, H, W) -> logits, or a tuple of outputs.

    The program takes one image; more are run one after another.
    """

    def __init__(self, content: bytes) -> None:
        """Load a program.

        Raises:
            UsageError: executorch is not installed.
            JobError: the runtime does not load the program.
        """
        super().__init__()
        runtime = _imported("executorch.runtime")
        try:
            self._program = runtime.Runtime.get().load_program(content)
            self._forward = self._program.load_method("forward")
            self.input_shape = tuple(self._forward.metadata.input_tensor_meta(0).sizes())
        except RuntimeError as error:
            raise JobError(f"ExecuTorch does not load the program: {one_line(error, limit=300)}.") from error

    def forward(self, images: Tensor) -> Any:
        """The outputs, float32, on the CPU; one tensor if there is one."""
        rows = [
            [y.clone() for y in self._forward.execute([image.contiguous()])]
            for image in images.detach().cpu().float().split(1)
        ]
        found = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        return found[0] if len(found) == 1 else tuple(found)


def export_executorch(run: Run | str | Path, path: str | Path, *, force: bool = False) -> Program:
    """Write a run as an ExecuTorch program (.pte), after its runtime has computed the same as PyTorch.

    XNNPACK computes a layer in integers if what it reads and what it returns are codes of 8 bits, so that
    the run's quantizers have to be where engines want them. Weights of fewer bits are stored in bytes. A
    layer whose result nothing rounds, the last one as a rule, has its weight in float and computes in float.
    The program takes one image a call.

    Args:
        run: a Run, or the folder of one.
        path: file to write; beside it goes `path`.json with the verification.
        force: replace it if it exists.

    Raises:
        UsageError: a run with other placement or activation bits, a file that exists already, a missing
            package, a damaged run.
        JobError: ExecuTorch does not lower the network, the program does not compute what the student
            computes, or it cannot be written.
    """
    _imported("executorch.runtime")
    file = Path(path)
    settings = account_of(file)
    check_free([file, settings], force=force)
    loaded = run if isinstance(run, Run) else load_run(run)
    _check_run(loaded)
    reference, lowered, notes = prepared_for_operators(loaded)
    in_float = _free_unrounded_layers(lowered)
    if in_float:
        notes.append(
            f"layers whose result is not quantized have float weights and compute in float: "
            f"{', '.join(in_float)}"
        )
    content, outside = _lower(with_operators(lowered), tuple(loaded.images.shape[1:]))
    if outside:
        notes.append(f"computed by ExecuTorch's own kernels and not by XNNPACK: {', '.join(outside)}")
    notes.append("it takes one image a call")
    with torch.no_grad():
        outputs = pytree.tree_leaves(ExecuTorchModel(content)(reference.images))
    found = agreeing("The ExecuTorch program", outputs, reference, fault="ExecuTorch or of zsq")
    count, engine = len(reference.images), f"executorch {_version()}"
    result = Program(file, settings, len(content), engine, count, found, tuple(notes), outside)
    about = metadata_of(loaded, BYTES, "int8") | {"zsq.target": "executorch"}
    write_with_account(file, content, {**about, **result.to_json()})
    return result


def open_executorch(path: str | Path) -> EngineFile:
    """Load a written program.

    Raises:
        UsageError: it cannot be read, ExecuTorch does not load it, or zsq did not write it.
    """
    file = Path(path)
    _imported("executorch.runtime")
    about, spec = read_account(file, "executorch", spec_in)
    try:
        model = ExecuTorchModel(file.read_bytes())
    except OSError as error:
        raise UsageError(f"The file {file} cannot be read: {error.strerror}.") from error
    except JobError as error:
        raise UsageError(f"{file} does not run here: {error} Export the run again.") from error
    check_input(file, model.input_shape, spec)
    return EngineFile(model, spec, about)


def _check_run(run: Run) -> None:
    """Refuse what XNNPACK would not compute in integers, or would compute wrongly."""
    bits = {m.bits for m in run.student.modules() if isinstance(m, ActivationQuantizer)}
    others = bits - {ACTIVATION_BITS}
    if others:
        raise UsageError(
            f"ExecuTorch's XNNPACK knows activations of 8 bits only, and the run has some of {min(others)}. "
            "Quantize with --bits W8A8 or W4A8 and --placement engine, or export with --to onnx."
        )
    if not reads_codes(run.student):
        raise UsageError(
            "ExecuTorch's XNNPACK computes in integers what reads and returns codes, and the quantizers of "
            "this run sit before layers only. Quantize with --placement engine, or export with --to onnx."
        )


def _free_unrounded_layers(student: fx.GraphModule) -> list[str]:
    """Give layers whose result no quantizer rounds their weight in float, in place; names of the layers.

    XNNPACK leaves such layers to ExecuTorch's kernels, which have no operator for their weights, or, with the
    library of quantized kernels loaded, gave wrong results (executorch 1.5.1).
    """
    found: list[str] = []
    for layer in list(student.graph.nodes):
        if layer.op != "call_function" or layer.target not in LAYERS or _is_rounded(student, layer):
            continue
        call: Any = layer.args[1]
        quantizer = student.get_submodule(str(call.target)) if call.op == "call_module" else None
        if not isinstance(quantizer, WeightQuantizer):
            continue
        name = f"float_{len(found)}"
        student.register_parameter(name, nn.Parameter(quantizer().detach(), requires_grad=False))
        with student.graph.inserting_before(layer):
            weight = student.graph.get_attr(name)
        weight.meta = dict(call.meta)
        layer.replace_input_with(call, weight)
        if not call.users:
            student.graph.erase_node(call)
        found.append(layer.name)
    student.recompile()
    return found


def _is_rounded(student: fx.GraphModule, node: fx.Node) -> bool:
    """Whether only quantizers read a tensor, past a ReLU or clip."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in FUSED:
        return _is_rounded(student, users[0])
    return all(
        user.op == "call_module" and isinstance(student.get_submodule(str(user.target)), ActivationQuantizer)
        for user in users
    )


def _lower(module: fx.GraphModule, size: tuple[int, ...]) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of a program for one image, and the kinds of operators that XNNPACK left over."""
    partition = _imported("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    exir = _imported("executorch.exir")
    _dequantize_for_each(module)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")  # of executorch, about PyTorch and Python
            program = exported_program(module, size, batch=1)
            edge = exir.to_edge_transform_and_lower(program, partitioner=[partition.XnnpackPartitioner()])
            content = bytes(edge.to_executorch().buffer)
    except Exception as error:  # its passes raise whatever they meet
        raise JobError(
            f"ExecuTorch {_version()} does not lower the network: {one_line(error, limit=300)}. "
            "Use --to onnx."
        ) from error
    nodes = [n for n in edge.exported_program().graph.nodes if n.op == "call_function"]
    schemas = [getattr(getattr(n.target, "_op", None), "_schema", None) for n in nodes]
    return content, tuple(sorted({s.name.partition("::")[2] for s in schemas if s is not None}))


def _dequantize_for_each(module: fx.GraphModule) -> None:
    """Give everything that reads codes a dequantizer of its own, in place.

    Where readers share one and one of them is not XNNPACK's, ExecuTorch finds cycles among its parts.
    """
    target = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    for node in list(module.graph.nodes):
        if node.target is not target:
            continue
        for reader in list(node.users)[1:]:
            with module.graph.inserting_after(node):
                own = module.graph.call_function(target, node.args)
            reader.replace_input_with(node, own)
    module.recompile()


def _imported(name: str) -> Any:
    """A module of executorch, without the warnings of its own imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_extra(name, EXTRA)


def _version() -> str:
    from importlib.metadata import version

    return version("executorch")
