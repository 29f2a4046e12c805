"""Put quantizers on a copy of the teacher's graph, as the scheme says."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import fx, nn

from zsq.graph.nodes import LAYERS, aten, weight_node
from zsq.graph.tensors import device_of, get_tensor, make_submodule
from zsq.quant.engine_placement import place_for_engine
from zsq.quant.placement import Placement, place
from zsq.quant.quantizers import ActivationQuantizer, quantize_weight
from zsq.quant.scheme import Scheme

OCTAVES = 16  # of probabilities that logarithmic codes tell apart, from 1 down to 2^-16


@dataclass(frozen=True)
class Quantizers:
    """Where the quantizers of a student are: dotted module names by graph node.

    Attributes:
        weights: weighted node -> WeightQuantizer.
        activations: quantized tensor's node -> ActivationQuantizer; several tensors may share one.
    """

    weights: dict[str, str]
    activations: dict[str, str]


def attach(teacher: fx.GraphModule, scheme: Scheme) -> tuple[fx.GraphModule, Quantizers]:
    """A student: the teacher's graph with its weights rounded to nearest and activation quantizers inserted.

    The student shares nothing with the teacher. Its activation quantizers have no range yet (NaN):
    `calibrate` or the reconstruction sets it. Every reader of a quantized tensor has a quantizer call of its
    own, all of one module, so that each can draw its own drop mask.

    Args:
        teacher: a captured network.
        scheme: bits and their placement. With placement "engine", weights of 8 bits are symmetric: codes of
            fewer bits fit in bytes around 0 with any zero point, and engines compute slowly with others.
    """
    placement = (place_for_engine if scheme.placement == "engine" else place)(teacher.graph, scheme)
    student = fx.GraphModule(_own_tensors(teacher), copy.deepcopy(teacher.graph), "Student")
    quantizers = Quantizers(
        weights=_attach_weights(student, placement, symmetric=scheme.placement == "engine"),
        activations=_attach_activations(student, placement),
    )
    student.graph.eliminate_dead_code()
    student.delete_all_unused_submodules()
    _drop_unused_tensors(student)
    student.graph.lint()
    student.recompile()
    student.requires_grad_(False)
    return student.eval(), quantizers


def _own_tensors(teacher: fx.GraphModule) -> nn.Module:
    """A plain module tree with copies of the tensors that the graph reads; the teacher stays untouched."""
    root = nn.Module()
    for node in teacher.graph.nodes:
        if node.op != "get_attr":
            continue
        path, _, name = str(node.target).rpartition(".")
        owner = make_submodule(root, path)
        if name not in owner._parameters and name not in owner._buffers:
            tensor = get_tensor(teacher, str(node.target)).detach().clone()
            if isinstance(get_tensor(teacher, str(node.target)), nn.Parameter):
                owner.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                owner.register_buffer(name, tensor)
    return root


def _attach_weights(student: fx.GraphModule, placement: Placement, *, symmetric: bool) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in list(student.graph.nodes):
        weight = weight_node(node)
        if weight is None or node.name not in placement.weights:  # its input does not depend on the images
            continue
        name = f"{weight.target}_quantizer"
        while name in names.values():  # a weight that several layers share
            name += "_again"
        quantizer = quantize_weight(
            get_tensor(student, str(weight.target)),
            bits=placement.weights[node.name],
            axis=LAYERS[node.target],
            symmetric=symmetric and placement.weights[node.name] == 8,
        )
        student.add_submodule(name, quantizer)
        with student.graph.inserting_before(node):
            call = student.graph.call_module(name)
        call.meta = dict(weight.meta)
        node.update_arg(1, call)
        names[node.name] = name
    return names


def _attach_activations(student: fx.GraphModule, placement: Placement) -> dict[str, str]:
    by_name = {node.name: node for node in student.graph.nodes}
    device = device_of(student)
    names: dict[str, str] = {}
    for tensor, bits in placement.activations.items():
        source, first = by_name[tensor], placement.shared.get(tensor, tensor)
        name = f"activation_quantizers.{first}" + "_" * hasattr(nn.Module, first)  # "to", "float" ...
        if first == tensor:
            student.add_submodule(name, ActivationQuantizer(bits=bits).to(device))
        for reader in placement.readers[tensor]:
            with student.graph.inserting_before(by_name[reader]):
                if tensor in placement.logarithmic:
                    call = _logarithmic_call(student, name, source)
                else:
                    call = student.graph.call_module(name, (source,))
            call.meta = dict(source.meta)
            by_name[reader].replace_input_with(source, call)
        names[tensor] = name
    return names


def _logarithmic_call(student: fx.GraphModule, name: str, source: fx.Node) -> fx.Node:
    """2^-q(-log2 x) of probabilities, with q the quantizer; its range is fixed to 0 .. OCTAVES.

    Source: FQ-ViT (arXiv:2111.13824), log2 quantization of softmax, for 4 bits.
    """
    quantizer = student.get_submodule(name)
    assert isinstance(quantizer, ActivationQuantizer)
    quantizer.set_range(torch.tensor(OCTAVES / 2**quantizer.bits), torch.tensor(0.0))
    value: fx.Node = source
    for operation, *args in (
        (aten.clamp_min.default, 2.0**-OCTAVES),
        (aten.log.default,),
        (aten.mul.Tensor, -1 / math.log(2)),
    ):
        value = student.graph.call_function(operation, (value, *args))
        value.meta = dict(source.meta)
    value = student.graph.call_module(name, (value,))
    value.meta = dict(source.meta)
    value = student.graph.call_function(aten.mul.Tensor, (value, -math.log(2)))
    value.meta = dict(source.meta)
    return student.graph.call_function(aten.exp.default, (value,))


def _drop_unused_tensors(student: fx.GraphModule) -> None:
    """Remove the float weights that a quantizer has replaced."""
    used = {str(node.target) for node in student.graph.nodes if node.op == "get_attr"}
    for module_name, module in student.named_modules():
        if any(
            f"{module_name}.".startswith(f"{n.target}.") for n in student.graph.nodes if n.op == "call_module"
        ):
            continue
        for store in (module._parameters, module._buffers):
            for name in [n for n in store if f"{module_name}.{n}".lstrip(".") not in used]:
                del store[name]
