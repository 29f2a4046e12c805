"""Observe activations and set the ranges of their quantizers."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq.quant.affine import choose_qparams
from zsq.quant.quantizers import ActivationQuantizer
from zsq.quant.ranges import error_minimising, error_minimising_ends, minmax, percentile
from zsq.recipe import Calibration


def choose_activation_range(x: Tensor, *, bits: int, settings: Calibration) -> tuple[Tensor, Tensor]:
    """Scale and zero point (scalars; codes 0 .. 2^bits - 1) for values like those of `x`.

    Symmetric settings give zero point 0 when no value is negative, else 2^(bits-1): the signed symmetric
    quantizer in unsigned codes.
    """
    signed = bool((x < 0).any())
    if settings.method == "error" and signed and not settings.symmetric:
        scale, zero_point = error_minimising_ends(x, bits=bits, exponent=settings.exponent)
    elif settings.method == "error":
        scale, zero_point = error_minimising(
            x,
            bits=bits,
            signed=settings.symmetric and signed,
            symmetric=settings.symmetric,
            exponent=settings.exponent,
        )
    else:
        lo, hi = minmax(x) if settings.method == "minmax" else percentile(x, settings.percentile)
        shift = 2 ** (bits - 1) if settings.symmetric and signed else 0
        scale, zero_point = choose_qparams(
            lo, hi, qmin=-shift, qmax=2**bits - 1 - shift, symmetric=settings.symmetric
        )
    if settings.symmetric and signed:
        zero_point = zero_point + 2 ** (bits - 1)
    return scale, zero_point


def calibrate(
    part: nn.Module, inputs: Sequence[Tensor], settings: Calibration, *, settled: Collection[nn.Module] = ()
) -> None:
    """Run `part` once and set the range of every activation quantizer that it meets from what arrives there.

    Quantizers that come later see the output of those before them, as in use. The range of one that several
    tensors share fits all of them.

    Args:
        part: a student or a unit of it.
        inputs: its arguments; the first `settings.num_images` rows are used.
        settled: quantizers whose range stays as it is.
    """
    with _observing(part, settings, settled), torch.no_grad():
        part(*(x[: settings.num_images] for x in inputs))


@contextmanager
def _observing(part: nn.Module, settings: Calibration, settled: Collection[nn.Module]) -> Iterator[None]:
    done = set(settled)
    several = _readers_of_several(part)
    arrived: dict[nn.Module, list[Tensor]] = {}

    def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in done or not isinstance(module, ActivationQuantizer):
            return
        seen = [args[0]]
        if module in several:
            seen = arrived.setdefault(module, [])
            if any(x is args[0] for x in seen):
                return
            seen.append(args[0])
        else:
            done.add(module)
        set_range_for(module, seen, settings)

    handles = [
        m.register_forward_pre_hook(observe) for m in part.modules() if isinstance(m, ActivationQuantizer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def set_range_for(quantizer: ActivationQuantizer, tensors: Sequence[Tensor], settings: Calibration) -> None:
    """Set a range that fits all values of some tensors."""
    x = tensors[0] if len(tensors) == 1 else torch.cat([t.flatten() for t in tensors])
    quantizer.set_range(*choose_activation_range(x, bits=quantizer.bits, settings=settings))


def _readers_of_several(part: nn.Module) -> set[nn.Module]:
    """The modules of a graph that are called with different tensors."""
    read: dict[nn.Module, set[fx.Node]] = {}
    for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
        if node.op == "call_module" and node.args:
            read.setdefault(part.get_submodule(str(node.target)), set()).add(node.args[0])
    return {module for module, tensors in read.items() if len(tensors) > 1}
