"""Losses of images: functions of a ForwardPass, smaller when better."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zsq.images.forward import ForwardPass
from zsq.images.prior import STANDARD, InputPrior, constant

Looks = tuple[Tensor, Tensor]  # mean and deviation of every channel of every image, (N, C)
STATISTICS_KERNEL = ("cpu", "cuda")  # devices that have the reduction kernel of BatchNorm


def channel_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, over images and positions.

    One pass forward and one backward with the kernels of BatchNorm, which are several times faster than
    `torch.var_mean` on a CPU. Differentiable once. A constant channel gets gradient 0 from its deviation, as
    with `torch.std`.

    Args:
        features: (N, C, ...), float32, bfloat16 or float64.

    Returns:
        mean and unbiased standard deviation, each (C,), float32 (float64 for float64 features).

    Raises:
        ValueError: a channel has fewer than two values.
    """
    return joined_statistics([features])


def joined_statistics(layers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`channel_statistics` of several tensors, one after the other in two vectors.

    What follows are sums over a few channels: done for all layers at once, they are a handful of operations.

    Args:
        layers: each as there, of one device; all float64, or none.
    """
    mean, std = _ChannelStatistics.apply(*layers)
    return mean, std


class _ChannelStatistics(torch.autograd.Function):
    """d mean / dx = 1 / n;  d std / dx = (x - mean) / ((n - 1) std)."""

    @staticmethod
    def forward(ctx: Any, *layers: Tensor) -> tuple[Tensor, Tensor]:
        sizes = tuple((x.shape[1], x.numel() // x.shape[1]) for x in layers)
        for x, (_, count) in zip(layers, sizes, strict=True):
            if count < 2:
                raise ValueError(f"need at least 2 values a channel, got {count} of {tuple(x.shape)}")
        dtype, device = torch.promote_types(layers[0].dtype, torch.float32), layers[0].device
        unused = torch.zeros(2, sum(c for c, _ in sizes), dtype=dtype, device=device)
        parts = unused.split([c for c, _ in sizes], 1)
        found = [_mean_and_biased_variance(x, part) for x, part in zip(layers, parts, strict=True)]
        mean, var = (torch.cat(values) for values in zip(*found, strict=True))
        counts = _by_channel(tuple((c, float(count)) for c, count in sizes), device, dtype)
        std = (var * (counts / (counts - 1))).sqrt()
        ctx.sizes = sizes
        ctx.save_for_backward(*layers, mean, std, counts)
        return mean, std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_std: Tensor) -> tuple[Tensor, ...]:
        *layers, mean, std, counts = ctx.saved_tensors
        slope = torch.where(std > 0, grad_std / ((counts - 1) * std), 0.0)
        # (x - mean) * slope + grad_mean / n, one fused pass: BatchNorm with these as its parameters
        channels = [c for c, _ in ctx.sizes]
        parameters = (slope, grad_mean / counts, mean, torch.ones_like(mean))
        by_layer = zip(layers, *(values.split(channels) for values in parameters), strict=True)
        return tuple(
            torch.batch_norm(x, weight, bias, middle, one, False, 0.0, 0.0, False)
            for x, weight, bias, middle, one in by_layer
        )


@lru_cache(maxsize=64)
def _by_channel(layers: tuple[tuple[int, float], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """For layers of (channels, value), the value of its layer for every channel; copied over once."""
    return torch.cat([torch.full((c,), value, dtype=dtype) for c, value in layers]).to(device)


def _mean_and_biased_variance(features: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
    """`unused`: room for running statistics, (2, C), in the dtype of the result."""
    if features.device.type in STATISTICS_KERNEL:
        mean, var = torch.batch_norm_update_stats(features, unused[0], unused[1], 0.0)
    else:
        axes = [axis for axis in range(features.ndim) if axis != 1]
        var, mean = torch.var_mean(features.to(unused.dtype), dim=axes, correction=0)
    return mean, var


def bn_statistics_distance(
    features: Tensor, mean: Tensor, var: Tensor, *, eps: float = 1e-6, scale: Tensor | None = None
) -> Tensor:
    """Squared distance between a batch's channel statistics and those a BatchNorm stored.

    Average over channels c of (mu_c - mean_c)^2 + (sigma_c - sqrt(var_c + eps))^2; mu and sigma are the mean
    and the square root of the unbiased variance over images and positions. With `scale`, all of them are
    divided by it first (the variance by its square).

    Args:
        features: what the BatchNorm receives, (N, C, ...), activation units.
        mean: its running_mean, (C,), activation units.
        var: its running_var, (C,), activation units squared; a variance, not a deviation.
        eps: added to `var` only, not to the batch's.
        scale: (C,), not 0, either sign: units of the three above, see `NormInput`. None is 1.

    Returns:
        Scalar >= 0, activation units squared, float32 also for bfloat16 features.

    Raises:
        ValueError: `mean` or `var` is not (C,), or a channel has fewer than two values.

    Source: Genie's code (see arXiv:2212.04780): unbiased, eps 1e-6 instead of the layer's own, divided by C
    where the paper's formula sums.
    """
    channels = features.shape[1]
    if mean.shape != (channels,) or var.shape != (channels,):
        raise ValueError(
            f"mean and var must be ({channels},), got {tuple(mean.shape)} and {tuple(var.shape)}"
        )
    return _squared_gaps(*channel_statistics(features), mean, var, eps, scale).mean()


def _squared_gaps(
    batch_mean: Tensor, batch_std: Tensor, mean: Tensor, var: Tensor, eps: float, scale: Tensor | None
) -> Tensor:
    """What `bn_statistics_distance` averages, (C,)."""
    if scale is None:
        return (batch_mean - mean).square() + (batch_std - (var + eps).sqrt()).square()
    std = (var / scale.square() + eps).sqrt()
    return ((batch_mean - mean) / scale).square() + (batch_std / scale.abs() - std).square()


@dataclass(frozen=True)
class BatchNormStatistics:
    """Sum over all BatchNorm layers of `bn_statistics_distance`.

    Attributes:
        eps: added to the stored variances.
        relative: each layer's distance is divided by the mean of its stored variances.
    """

    eps: float = 1e-6
    relative: bool = False

    def __call__(self, forward: ForwardPass) -> Tensor:
        norms = forward.norms
        statistics = joined_statistics([norm.features for norm in norms])
        mean, var = torch.cat([n.mean for n in norms]), torch.cat([n.var for n in norms])
        scales = [torch.ones_like(n.var) if n.scale is None else n.scale for n in norms]
        scale = None if all(n.scale is None for n in norms) else torch.cat(scales)
        gaps = _squared_gaps(*statistics, mean, var, self.eps, scale)
        if self.relative:
            weights = [(1 / (len(n.mean) * n.mean_variance())).expand(len(n.mean)) for n in norms]
            return (gaps * torch.cat(weights)).sum()
        shares = tuple((len(norm.mean), 1 / len(norm.mean)) for norm in norms)
        return (gaps * _by_channel(shares, gaps.device, gaps.dtype)).sum()


@dataclass(frozen=True)
class InputStatistics:
    """Distance of every single image from the expected mean and deviation.

    Average over images of the sum over channels of (mu - m)^2 + (sigma - s)^2; mu and sigma (unbiased) over
    the pixels of one channel of one image, both relative to the prior: (mu - mean) / std and sigma / std.

    Attributes:
        prior: expected mean and deviation of each channel; the published ones are 0 and 1.
        looks: m and s, each (N, C), relative to the prior; None is 0 and 1, as published.

    Source: Genie's code (see arXiv:2212.04780).
    """

    prior: InputPrior = STANDARD
    looks: Looks | None = None

    def __call__(self, forward: ForwardPass) -> Tensor:
        mean, std = pixel_statistics(forward.images, self.prior)
        if self.looks is not None:
            middle, spread = (values.reshape(-1) for values in self.looks)
            return ((mean - middle).square() + (std - spread).square()).sum() / len(forward.images)
        return (mean.square() + (std - 1).square()).sum() / len(forward.images)


def pixel_statistics(images: Tensor, prior: InputPrior) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of the pixels of every channel of every image, relative to the prior.

    Args:
        images: (N, C, H, W), normalised.
        prior: mean and deviation that count as 0 and 1.

    Returns:
        mean and deviation, each (N * C,).
    """
    n, c, h, w = images.shape
    mean, std = channel_statistics(images.reshape(1, n * c, h, w))
    if not prior.is_standard:
        shift, scale = (constant(v, mean.device).to(mean.dtype).repeat(n) for v in (prior.mean, prior.std))
        mean, std = (mean - shift) / scale, std / scale
    return mean, std
