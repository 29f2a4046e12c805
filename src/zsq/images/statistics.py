"""BatchNorm statistics matched in the forms that papers have: which spread, over images or over a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from zsq.images.forward import ForwardPass, NormInput, resolved_units
from zsq.images.losses import channel_statistics
from zsq.images.pixel_settings import StatisticsMatch

EPS = 1e-6  # added to stored variances before the root

Slack = tuple[Tensor, Tensor]  # of one layer: gaps of mean and of spread that cost nothing, scalars


def statistics_gaps(norm: NormInput, settings: StatisticsMatch) -> tuple[Tensor, Tensor | None]:
    """How far the statistics of what a BatchNorm receives are from those it stored.

    Gaps of the mean, in units of the layer's input, and of the spread: deviations (that of the batch
    unbiased, EPS added to the stored variance), or variances (that of the batch biased, units squared). With
    units of deviations, both are divided by the root of the mean of the layer's stored variances (variances
    by that mean).

    Args:
        norm: a layer's input beside its statistics.
        settings: `spread`, `over` and `units`, which is not "auto".

    Returns:
        Two tensors (C,) or, over="image", (N, C), differentiable. The second is None where an image has a
        single position and so no spread of its own.

    Source: IntraQ and HAST match biased variances of a batch, ZeroQ unbiased deviations of each image (all as
    in their code; its root has EPS on both sides).
    """
    features = norm.features
    n, c = features.shape[:2]
    scale = torch.ones_like(norm.var) if norm.scale is None else norm.scale
    eps: float | Tensor = EPS
    if settings.units == "deviations":
        unit = norm.mean_variance()
        scale, eps = scale * unit.sqrt(), EPS / unit
    if settings.over == "batch":
        mean, std = channel_statistics(features)
        count = features.numel() // c
    else:
        count = features.numel() // (n * c)
        if count < 2:
            return (features.float().reshape(n, c) - norm.mean) / scale, None
        mean, std = channel_statistics(features.reshape(1, n * c, -1))
        mean, std = mean.view(n, c), std.view(n, c)
    mean_gap = (mean - norm.mean) / scale
    if settings.spread == "variance":
        return mean_gap, (std.square() * ((count - 1) / count) - norm.var) / scale.square()
    return mean_gap, std / scale.abs() - (norm.var / scale.square() + eps).sqrt()


def with_units(settings: StatisticsMatch, teacher: fx.GraphModule) -> StatisticsMatch:
    """The settings with the units that "auto" stands for on a captured network."""
    return replace(settings, units=resolved_units(teacher, settings.units))


def slack_of(forward: ForwardPass, settings: StatisticsMatch) -> list[Slack]:
    """For each layer, the `slack` quantiles of the absolute gaps that the images of a forward pass give.

    Args:
        forward: of Gaussian noise.
        settings: `slack` and the form of the gaps.

    Returns:
        Two scalars a layer, without history; 0 for a spread that images do not have.

    Source: slack distribution alignment, DSG (arXiv:2103.01049).
    """
    found = []
    for norm in forward.norms:
        gaps = statistics_gaps(norm, settings)
        zero = torch.zeros((), device=norm.mean.device)
        mean, spread = (zero if g is None else _quantile(g.detach().abs(), settings.slack) for g in gaps)
        found.append((mean, spread))
    return found


@dataclass(frozen=True)
class StatisticsDistance:
    """Squared gaps of all layers, put together as the settings say.

    Attributes:
        settings: form of the gaps, means or sums, factors of layers; `weight` is left to the caller.
        slack: of each layer, from `slack_of`; None for none.
    """

    settings: StatisticsMatch
    slack: Sequence[Slack] | None = None

    def __call__(self, forward: ForwardPass) -> Tensor:
        """Scalar >= 0, float32; with variances it has units of activations to the fourth power."""
        settings, total = self.settings, len(forward.norms)
        images = torch.arange(len(forward.images), device=forward.images.device) if settings.enhance else None
        distances = [torch.zeros((), device=forward.images.device)]
        for index, norm in enumerate(forward.norms):
            factor = settings.deep if is_deep(index, total) else settings.shallow
            if factor == 0:
                continue
            distance = self._layer(index, norm)
            if images is not None:
                distance = distance * (1 + (images % total == index))
            distances.append(factor * distance.mean())
        return torch.stack(distances).sum() / (total if settings.layers == "mean" else 1)

    def _layer(self, index: int, norm: NormInput) -> Tensor:
        """Scalar, or (N,) over images."""
        squares = []
        for position, gap in enumerate(statistics_gaps(norm, self.settings)):
            if gap is not None:
                if self.slack is not None:
                    gap = (gap.abs() - self.slack[index][position]).clamp(min=0)
                squares.append(gap.square())
        square = torch.stack(squares).sum(0)
        return square.mean(-1) if self.settings.channels == "mean" else square.sum(-1)


def is_deep(index: int, total: int) -> bool:
    """Whether a layer counts as deep: from number L // 2 - 1 on, as in SynQ's code ((L + 2) // 2 - 2)."""
    return index >= total // 2 - 1


def pooled_statistics(passes: Sequence[ForwardPass]) -> list[tuple[Tensor, Tensor]]:
    """Mean and biased variance of what each BatchNorm receives over several batches of images.

    The variance is that within the batches plus that of their means. For folded layers both are in the units
    of `NormInput.features`.

    Args:
        passes: one a batch, of the same network.

    Returns:
        (mean, var), each (C,), a layer; without history.
    """
    sizes = torch.tensor([float(len(p.images)) for p in passes], device=passes[0].images.device)
    share = (sizes / sizes.sum()).view(-1, 1)
    found = []
    for layer in range(len(passes[0].norms)):
        features = [p.norms[layer].features for p in passes]
        means, variances = [], []
        for x in features:
            count = x.numel() // x.shape[1]
            mean, std = channel_statistics(x.detach())
            means.append(mean)
            variances.append(std.square() * ((count - 1) / count))
        m, v = torch.stack(means), torch.stack(variances)
        mean = (share * m).sum(0)
        found.append((mean, (share * (v + (m - mean).square())).sum(0)))
    return found


def image_statistics(forward: ForwardPass) -> list[tuple[Tensor, Tensor]]:
    """Mean and biased variance over the positions of each image's channels, at every BatchNorm.

    Returns:
        (mean, var), each (N, C), a layer, in the units of `NormInput.features`; without history. The variance
        is 0 where there is a single position.
    """
    found = []
    for norm in forward.norms:
        positions = norm.features.detach().float().flatten(2)
        if positions.ndim == 2:
            positions = positions[..., None]
        var, mean = torch.var_mean(positions, dim=2, correction=0)
        found.append((mean, var))
    return found


def with_targets(forward: ForwardPass, targets: Sequence[tuple[Tensor, Tensor]]) -> ForwardPass:
    """A forward pass whose deep layers are beside other statistics than the stored ones.

    Args:
        forward: a pass of the network that `pooled_statistics` saw.
        targets: (mean, var) of all layers, each (C,); or (N, C), for gaps of each image on its own.
    """
    total = len(forward.norms)
    norms = tuple(
        replace(norm, mean=mean, var=var) if is_deep(index, total) else norm
        for index, (norm, (mean, var)) in enumerate(zip(forward.norms, targets, strict=True))
    )
    return replace(forward, norms=norms)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of (C,), or of (N, C) after the mean over images."""
    return torch.quantile(values if values.ndim == 1 else values.mean(0), share)
