"""Losses between a student's and a teacher's tensors."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_DECIBELS = 999.0


def output_distance(output: Tensor, target: Tensor, *, channel_axis: int) -> Tensor:
    """Squared error summed over channels, averaged over images and positions.

    Args:
        output: what the student's unit returns, (N, C, H, W), (N, T, C) or (N, C), activation units.
        target: the teacher's, same shape.
        channel_axis: which axis is summed.

    Returns:
        Scalar >= 0, activation units squared.

    Source: BRECQ, QDrop and Genie (arXiv:2212.04780), reconstruction loss with p = 2 as in their code.
    """
    return _squared_error(output, target) * (output.shape[channel_axis] / output.numel())


class _SquaredError(torch.autograd.Function):
    """Sum of squares of output - target; gradient 2 (output - target) for the output, none for the target."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor) -> Tensor:
        difference = output - target
        ctx.save_for_backward(difference)
        norm: Tensor = torch.linalg.vector_norm(difference)
        return norm.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * grad), None


_squared_error: Callable[..., Tensor] = _SquaredError.apply


def energies(target: Tensor, output: Tensor) -> tuple[float, float]:
    """Sums of squares, in float64: of the target, and of what the output differs from it by."""
    wanted = target.double()
    return float(wanted.square().sum()), float((wanted - output.double()).square().sum())


def signal_to_noise(signal_energy: float, noise_energy: float) -> float:
    """Ratio of energies in decibels, 10 log10(signal / noise), cut to +-MAX_DECIBELS: JSON has no infinity.

    MAX_DECIBELS stands for no noise at all, -MAX_DECIBELS for infinite noise or energies that are NaN.
    """
    if math.isnan(signal_energy) or not math.isfinite(noise_energy):
        return -MAX_DECIBELS
    if noise_energy <= 0:
        return MAX_DECIBELS
    ratio = 10 * math.log10(max(signal_energy, 1e-30) / noise_energy)
    return max(-MAX_DECIBELS, min(ratio, MAX_DECIBELS))
