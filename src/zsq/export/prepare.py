"""The student as it is exported: shapes known, BatchNorm folded, zero points as the target wants them."""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq.errors import UsageError
from zsq.export.targets import Target
from zsq.graph.fold import BATCH_NORM, scales_channels
from zsq.graph.nodes import LAYERS
from zsq.graph.tensors import get_tensor
from zsq.quant.affine import along_axis
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer

BATCHES = (2, 3)  # two runs tell the batch size from the other dimensions


def prepared(student: fx.GraphModule, images: Tensor, target: Target) -> tuple[fx.GraphModule, list[str]]:
    """A copy of the student, ready to be lowered, and what was changed about it, in sentences.

    Args:
        student: a quantized network.
        images: (N, C, H, W); only their size counts.
        target: the engine.

    Returns:
        The copy: every node has `meta["shape"]`, for tensors a tuple with None for dimensions that grow with
        the batch (for lists of tensors, a list of such), and notes.

    Raises:
        UsageError: a quantizer has no usable range, or there are no images.
    """
    if len(images) == 0:
        raise UsageError(
            "The run has no images (those that were given to it were not published), and exports are checked "
            "on them. Export the run before it is published; its exports go along."
        )
    module = copy.deepcopy(student).cpu().eval()
    _check_ranges(module)
    _propagate_shapes(module, images)
    notes = _fold_batch_norms(module)
    if target.symmetric:
        notes += _make_symmetrical(module)
    module.graph.lint()
    module.recompile()
    return module, notes


def _check_ranges(student: fx.GraphModule) -> None:
    for name, module in student.named_modules():
        if isinstance(module, (ActivationQuantizer, WeightQuantizer)):
            scale = module.scale.detach()
            zero_point = module.zero_point.detach().float()
            highest = 2**module.bits - 1
            whole = bool(
                ((zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point <= highest)).all()
            )
            if not (bool((torch.isfinite(scale) & (scale > 0)).all()) and whole):
                raise UsageError(
                    f"The quantizer {name} has no usable range (scale {scale.flatten()[0]:g}, zero point "
                    f"{zero_point.flatten()[0]:g}): the run is damaged or was not calibrated. Quantize again."
                )


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every node's result."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.found[n.name] = _shape(result)
        return result


def _shape(result: Any) -> Any:
    if isinstance(result, (list, tuple)):
        return [_shape(part) for part in result]
    return tuple(result.shape) if isinstance(result, Tensor) else result


@torch.no_grad()
def _propagate_shapes(module: fx.GraphModule, images: Tensor) -> None:
    runs = []
    for batch in BATCHES:
        shapes = _Shapes(module)
        shapes.run(torch.zeros(batch, *images.shape[1:]))
        runs.append(shapes.found)
    for node in module.graph.nodes:
        first, second = (run.get(node.name) for run in runs)
        node.meta["shape"] = _joined(first, second)


def _joined(first: Any, second: Any) -> Any:
    """One shape of two runs; None where they differ."""
    if isinstance(first, list):
        return [_joined(a, b) for a, b in zip(first, second, strict=True)]
    if isinstance(first, tuple):
        return tuple(a if a == b else None for a, b in zip(first, second, strict=True))
    return first if first == second else None


def _fold_batch_norms(module: fx.GraphModule) -> list[str]:
    """Fold each BatchNorm into the scales and the bias of the layer before it, exactly.

    A weight s (c - z) times a factor f is (|f| s) (c - z) for f > 0. For f < 0 the codes are mirrored:
    c' = q - c and z' = q - z with q = 2^bits - 1, so that c' - z' = -(c - z) and the scale stays positive.
    """
    kept = []
    for norm in list(module.graph.nodes):
        if norm.op != "call_function" or norm.target is not BATCH_NORM:
            continue
        layer = norm.args[0] if scales_channels(norm.args[0], norm) else None
        quantizer = _own_quantizer(module, layer) if layer is not None else None
        if layer is None or quantizer is None:
            kept.append(norm.name)
            continue
        factor, shift = batch_norm_affine(module, norm)
        scale_channels(quantizer, factor)
        bias = layer.args[2] if len(layer.args) > 2 else None
        old = get_tensor(module, str(bias.target)).double() if isinstance(bias, fx.Node) else 0.0
        name = f"{norm.name}_folded_bias"
        module.register_parameter(name, nn.Parameter((old * factor + shift).float(), requires_grad=False))
        with module.graph.inserting_before(layer):
            new_bias = module.graph.get_attr(name)
        new_bias.meta["shape"] = tuple(factor.shape)
        args = [*layer.args]
        args[2:3] = [new_bias]
        layer.args = tuple(args)
        norm.replace_all_uses_with(layer)
        module.graph.erase_node(norm)
    module.graph.eliminate_dead_code()
    return [_float_note(kept)] if kept else []


def _float_note(kept: list[str]) -> str:
    shown = ", ".join(kept[:3]) + (", ..." if len(kept) > 3 else "")
    return f"{len(kept)} BatchNorms follow no layer directly and stay as float operations: {shown}"


def batch_norm_affine(module: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Factor and shift (C,), float64, of a BatchNorm with stored statistics: y = factor x + shift."""

    def stored(argument: Any, default: float) -> Tensor:
        if isinstance(argument, fx.Node):
            return get_tensor(module, str(argument.target)).detach().double()
        return torch.full_like(mean, default)

    mean = get_tensor(module, str(norm.args[3].target)).detach().double()  # type: ignore[union-attr]
    var = get_tensor(module, str(norm.args[4].target)).detach().double()  # type: ignore[union-attr]
    factor = stored(norm.args[1], 1.0) * torch.rsqrt(var + float(norm.args[7]))  # type: ignore[arg-type]
    return factor, stored(norm.args[2], 0.0) - mean * factor


def _own_quantizer(module: fx.GraphModule, layer: fx.Node) -> WeightQuantizer | None:
    """The quantizer of a layer's weight, if it serves this layer alone and has a scale for each channel."""
    call = layer.args[1]
    assert isinstance(call, fx.Node)
    if call.op != "call_module" or len(call.users) != 1:
        return None
    calls = [n for n in module.graph.nodes if n.op == "call_module" and n.target == call.target]
    quantizer = module.get_submodule(str(call.target))
    groups = layer.args[6] if len(layer.args) > 6 else 1
    if not isinstance(quantizer, WeightQuantizer) or len(calls) != 1:
        return None
    return quantizer if LAYERS[layer.target] == 0 or groups == 1 else None


@torch.no_grad()
def scale_channels(quantizer: WeightQuantizer, factor: Tensor) -> None:
    """Multiply a quantized weight by one number an output channel, (C,), in place; no code is rounded."""
    scale = (quantizer.scale.double() * factor.abs()).float()
    codes, zero_point = quantizer.codes, quantizer.zero_point
    highest = 2**quantizer.bits - 1
    negative = along_axis(factor < 0, codes, quantizer.axis)
    vanishes = scale < torch.finfo(torch.float32).tiny
    codes = torch.where(negative, highest - codes, codes)
    zero_point = torch.where(factor < 0, highest - zero_point, zero_point)
    codes = torch.where(
        along_axis(vanishes, codes, quantizer.axis), along_axis(zero_point, codes, quantizer.axis), codes
    )
    quantizer.codes.copy_(codes)
    quantizer.zero_point.copy_(zero_point)
    quantizer.scale.copy_(torch.where(vanishes, quantizer.scale, scale))


@torch.no_grad()
def _make_symmetrical(module: fx.GraphModule) -> list[str]:
    """Round again what does not fit in signed bytes around 0. This changes the network, which is said."""
    changed = []
    for name, quantizer in list(module.named_modules()):
        if not isinstance(quantizer, (ActivationQuantizer, WeightQuantizer)):
            continue
        zero_point = quantizer.zero_point.long()
        if isinstance(quantizer, ActivationQuantizer):
            reach = int(max(zero_point, 2**quantizer.bits - 1 - zero_point))
            if reach > 127:
                quantizer.set_range(quantizer.scale * reach / 127, torch.tensor(128.0))
                changed.append(name)
            continue
        codes = quantizer.codes.long()
        centred = codes - along_axis(zero_point, codes, quantizer.axis)
        others = [a for a in range(codes.ndim) if a != quantizer.axis]
        reaches = centred.abs().amax(others)
        if int(reaches.max()) > 127:
            factor = reaches.clamp(min=127).float() / 127
            rounded = (centred / along_axis(factor, centred, quantizer.axis)).round()
            quantizer.codes.copy_(rounded + 128)
            quantizer.zero_point.fill_(128)
            quantizer.scale.mul_(factor)
            changed.append(name)
    if not changed:
        return []
    return [
        f"{len(changed)} quantizers with 8 bits had a range that is not symmetric and were rounded again to "
        "symmetric ones; the file was compared with that network"
    ]
