"""The quantized model as one file: packed integer codes, scales, zero points, float tensors, the graph."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, fx, nn

from zsq.errors import UsageError
from zsq.graph.serialize import graph_from_json, graph_to_json
from zsq.graph.tensors import get_tensor, make_submodule
from zsq.quant.affine import along_axis, integer_limits
from zsq.quant.packing import pack, unpack
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer

FORMAT = 1
_DAMAGE = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def student_to_bytes(student: fx.GraphModule) -> bytes:
    """A safetensors file: codes packed at their true width, scales, zero points, the rest in float.

    The header's metadata holds the graph and each quantizer's bits, so that the file alone gives the model.
    """
    tensors: dict[str, Tensor] = {}
    quantizers: dict[str, dict[str, Any]] = {}
    for name, module in sorted(student.named_modules(), key=lambda item: item[0]):
        if isinstance(module, WeightQuantizer):
            quantizers[name] = {
                "kind": "weight",
                "bits": module.bits,
                "axis": module.axis,
                "shape": list(module.codes.shape),
            }
            tensors[f"{name}.codes"] = pack(module.codes.cpu(), module.bits)
            tensors[f"{name}.scale"] = module.scale
            tensors[f"{name}.zero_point"] = module.zero_point
        elif isinstance(module, ActivationQuantizer):
            quantizers[name] = {"kind": "activation", "bits": module.bits}
            tensors[f"{name}.scale"] = module.scale
            tensors[f"{name}.zero_point"] = module.zero_point
    constants: dict[str, str] = {}
    for node in student.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            tensor = get_tensor(student, name)
            tensors[name] = tensor
            constants[name] = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
    metadata = {
        "format": FORMAT,
        "graph": graph_to_json(student.graph),
        "quantizers": quantizers,
        "tensors": constants,
    }
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return save_safetensors(plain, {"zsq": json.dumps(metadata, separators=(",", ":"))})


def student_from_file(path: Path, input_size: tuple[int, int, int] | None = None) -> fx.GraphModule:
    """Read a student back; the same logits, bit for bit. With (C, H, W) a black image is run through it.

    Raises:
        UsageError: not a file of this kind, damaged, written by another version, or it rejects the image.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"The quantized model {path} cannot be read: {error.strerror}.") from error
    try:
        tensors = load_safetensors(content)
        (header_size,) = struct.unpack("<Q", content[:8])
        metadata = json.loads(json.loads(content[8 : 8 + header_size])["__metadata__"]["zsq"])
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no dictionary")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, struct.error) as error:
        raise UsageError(
            f"{path} is not a quantized model that zsq wrote, or it is damaged ({error}). "
            "Quantize again, or copy the file from where it was written."
        ) from error
    if metadata.get("format") != FORMAT:
        raise UsageError(
            f"{path} has format {metadata.get('format')!r}; this version of zsq reads format {FORMAT}. "
            "Use the version named in run.json."
        )
    root = nn.Module()
    try:
        for name, about in metadata["quantizers"].items():
            _put(root, name, _quantizer(name, about, tensors))
        for name, kind in metadata["tensors"].items():
            owner, _, leaf = name.rpartition(".")
            module = make_submodule(root, owner)
            if kind == "parameter":
                module.register_parameter(leaf, nn.Parameter(tensors[name], requires_grad=False))
            else:
                module.register_buffer(leaf, tensors[name])
        student = graph_from_json(metadata["graph"], root, "Student").eval()
        if input_size is not None:
            with torch.no_grad():
                student(torch.zeros(1, *input_size))
    except _DAMAGE as error:
        raise UsageError(
            f"{path} is damaged: {' '.join(str(error).split())[:300].rstrip('.')}. "
            "Quantize again, or copy the file from where it was written."
        ) from error
    return student


def _quantizer(name: str, about: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    scale, zero_point = tensors[f"{name}.scale"], tensors[f"{name}.zero_point"]
    integer_limits(about["bits"], signed=False)
    if about["kind"] == "activation":
        quantizer = ActivationQuantizer(bits=about["bits"])
        quantizer.set_range(scale, zero_point)
        return quantizer
    codes = unpack(tensors[f"{name}.codes"], about["bits"], tuple(about["shape"]))
    along_axis(scale, codes, about["axis"])
    along_axis(zero_point, codes, about["axis"])
    return WeightQuantizer(codes, scale, zero_point, bits=about["bits"], axis=about["axis"])


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    make_submodule(root, owner).add_module(leaf, module)


def stored_bytes(student: fx.GraphModule) -> dict[str, int]:
    """Bytes of a student's file by what they hold: packed codes, quantizer numbers, float tensors, header."""
    content = student_to_bytes(student)
    tensors = load_safetensors(content)
    sizes = {"codes": 0, "quantizers": 0, "float": 0}
    for name, tensor in tensors.items():
        kind = "codes" if name.endswith(".codes") else "quantizers" if "quantizer" in name else "float"
        sizes[kind] += tensor.numel() * tensor.element_size()
    return {**sizes, "header": len(content) - sum(sizes.values())}
