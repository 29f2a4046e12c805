"""Biases as engines add them: integers, in steps of the input's scale times the weight's."""

from typing import Any

import torch
from torch import Tensor, fx

from zsq.graph.fold import BATCH_NORM, scales_channels
from zsq.graph.nodes import LAYERS
from zsq.graph.tensors import get_tensor
from zsq.quant.affine import along_axis
from zsq.quant.engine_placement import CARRIERS, CAT
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer


@torch.no_grad()
def round_biases(student: fx.GraphModule) -> int:
    """Round the biases of layers whose input is quantized to what an engine that adds integers has, in place.

    A layer's sums of products are multiples of s = (scale of the input) * (scale of the weight), by output
    channel, and its bias becomes one too, up to half of s away. That is the largest difference between an
    8-bit student and what an engine computes (cifar10_resnet8k, W8A8: relative error of the logits 0.010, and
    0.0016 once the student's biases are rounded), so the student takes it over. With a BatchNorm that folds
    into the layer, the bias is that of both, and the BatchNorm's is changed. Codes that fit in a byte 2^k
    times over are stored so, with s 2^k times smaller, see `spare_factor`.

    Args:
        student: calibrated.

    Returns:
        How many layers have such biases now.
    """
    count = 0
    for layer in student.graph.nodes:
        if layer.op != "call_function" or layer.target not in LAYERS:
            continue
        source, weight = _source(student, layer.args[0]), _module(student, layer.args[1])
        if source is None or not isinstance(weight, WeightQuantizer):
            continue
        step = source.scale.double() * weight.scale.double() / spare_factor(weight)
        norm = next(iter(layer.users)) if len(layer.users) == 1 else None
        folds = norm is not None and norm.target is BATCH_NORM and scales_channels(layer, norm)
        groups: Any = layer.args[6] if len(layer.args) > 6 else 1
        if LAYERS[layer.target] == 1 and groups != 1:
            continue  # its scales count channels of a group
        count += _round_norm(student, layer, norm, step) if folds else _round_own(student, layer, step)  # type: ignore[arg-type]
    return count


def spare_factor(weight: WeightQuantizer) -> int:
    """The largest power of 2 by which the codes, counted from their zero point, fit in a signed byte."""
    codes, zero_point = weight.codes.long(), weight.zero_point.long()
    largest = int((codes - along_axis(zero_point, codes, weight.axis)).abs().max())
    return int(2 ** max(7 - largest.bit_length(), 0))


def _round_own(student: fx.GraphModule, layer: fx.Node, step: Tensor) -> bool:
    bias = _alone(student, layer.args[2] if len(layer.args) > 2 else None)
    if bias is None:
        return False
    bias.copy_((bias.double() / step).round() * step)
    return True


def _round_norm(student: fx.GraphModule, layer: fx.Node, norm: fx.Node, step: Tensor) -> bool:
    """The bias of a layer and its BatchNorm, factor * (b - mean) + beta, in steps of |factor| * step."""
    beta = _alone(student, norm.args[2])
    if beta is None:
        return False
    gamma, mean, var = (_tensor(student, norm.args[i]) for i in (1, 3, 4))
    assert mean is not None and var is not None
    factor = torch.rsqrt(var.double() + float(norm.args[7]))  # type: ignore[arg-type]
    factor = factor if gamma is None else factor * gamma.double()
    own = _tensor(student, layer.args[2] if len(layer.args) > 2 else None)
    fixed = factor * ((0.0 if own is None else own.double()) - mean.double())
    folded = factor.abs() * step
    rounded = torch.where(folded > 0, ((fixed + beta.double()) / folded).round() * folded, fixed + beta)
    beta.copy_(rounded - fixed)
    return True


def _source(student: fx.GraphModule, node: Any) -> ActivationQuantizer | None:
    """The quantizer that the values of a tensor come from; concatenations have one that their parts share."""
    if isinstance(node, fx.Node) and node.op == "call_function":
        if node.target is CAT:
            parts: Any = node.args[0]
            sources = {_source(student, part) for part in parts}
            return sources.pop() if len(sources) == 1 else None
        if node.target in CARRIERS:
            return _source(student, node.args[0])
    found = _module(student, node)
    return found if isinstance(found, ActivationQuantizer) else None


def _module(student: fx.GraphModule, node: Any) -> torch.nn.Module | None:
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return student.get_submodule(str(node.target)) if is_call else None


def _tensor(student: fx.GraphModule, argument: Any) -> Tensor | None:
    return get_tensor(student, str(argument.target)) if isinstance(argument, fx.Node) else None


def _alone(student: fx.GraphModule, argument: Any) -> Tensor | None:
    """A stored tensor that nothing else reads."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    readers = [
        u for n in student.graph.nodes if n.op == "get_attr" and n.target == argument.target for u in n.users
    ]
    return get_tensor(student, str(argument.target)) if len(readers) == 1 else None
