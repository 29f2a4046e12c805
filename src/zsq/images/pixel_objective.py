"""The loss of images that are optimised as pixels."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from zsq.graph.tensors import device_of
from zsq.images.class_losses import ClassLosses, number_of_classes, soft_targets
from zsq.images.forward import Observer, observe
from zsq.images.losses import InputStatistics
from zsq.images.pixel_settings import PixelSynthesis
from zsq.images.prior import InputPrior
from zsq.images.statistics import StatisticsDistance, slack_of, with_targets
from zsq.images.texture import natural_energies, texture_distance, texture_energies, texture_gains

Targets = Sequence[tuple[Tensor, Tensor]]  # mean and variance of every BatchNorm's input


def pixel_objective(
    teacher: fx.GraphModule,
    settings: PixelSynthesis,
    shape: tuple[int, ...],
    *,
    labels: Tensor | None,
    targets: Targets | None,
    rng: torch.Generator,
    prior: InputPrior,
) -> Callable[[Tensor], dict[str, Tensor]]:
    """What pixels are optimised for: images (N, C, H, W) -> the parts of the loss, weighted, by name.

    Args: as for `optimise_pixels`; `shape` is that of the batch.

    Raises:
        UsageError: the teacher has no BatchNorm.
    """
    classes, device = settings.classes, device_of(teacher)
    distant = classes is not None and classes.distance_weight > 0
    observer = observe(teacher, logits=classes is not None, embedding=distant, fold=True)
    reduced = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
    of_classes = None
    if classes is not None:
        assert labels is not None
        soft = soft_targets(shape[0], share=classes.soft_share, lowest=classes.soft_lowest, rng=rng)
        of_classes = ClassLosses(classes, labels.to(device), soft.to(device), number_of_classes(teacher))
    distance = StatisticsDistance(settings.bn, _slack(observer, settings, shape, rng, device, prior))
    to_centres = StatisticsDistance(replace(settings.bn, shallow=0.0, deep=1.0))
    input_statistics = InputStatistics(prior)
    gains = texture_gains(shape[2], shape[3], device) if settings.texture_weight > 0 else None
    natural = None if gains is None else natural_energies(shape[2], shape[3], gains)

    def objective(images: Tensor) -> dict[str, Tensor]:
        with reduced:
            forward = observer(images)
        parts = {"bn": settings.bn.weight * distance(forward)}
        if of_classes is not None:
            parts |= of_classes(forward)
        if settings.image_weight > 0:
            parts["image"] = settings.image_weight * input_statistics(forward)
        if gains is not None and natural is not None:
            textures = texture_energies(images.float(), gains)
            parts["texture"] = settings.texture_weight * texture_distance(textures, natural)
        if settings.centres is not None and targets is not None:
            parts["centres"] = settings.centres.weight * to_centres(with_targets(forward, targets))
        return parts

    return objective


def _slack(
    observer: Observer,
    settings: PixelSynthesis,
    shape: tuple[int, ...],
    rng: torch.Generator,
    device: torch.device,
    prior: InputPrior,
) -> list[tuple[Tensor, Tensor]] | None:
    if settings.bn.slack == 0:
        return None
    noise = prior.apply(torch.randn(shape, generator=rng).to(device))
    with torch.no_grad():
        return slack_of(observer(noise), settings.bn)
