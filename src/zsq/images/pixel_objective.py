"""The loss of images that are optimised as pixels."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from zsq.graph.tensors import device_of
from zsq.images.class_losses import class_losses
from zsq.images.forward import ForwardPass, Observer, observe
from zsq.images.look_settings import PatchSimilarity
from zsq.images.looks import disagreement, mean_square, patch_cosines, similarity_entropy, variation
from zsq.images.losses import InputStatistics
from zsq.images.pixel_settings import PixelSynthesis, StatisticsMatch
from zsq.images.prior import InputPrior, constant
from zsq.images.statistics import StatisticsDistance, slack_of, with_targets, with_units
from zsq.images.texture import natural_energies, texture_distance, texture_energies, texture_gains
from zsq.kernels import computing_in

Targets = Sequence[tuple[Tensor, Tensor]]  # mean and variance of every BatchNorm's input
Part = Callable[[ForwardPass], dict[str, Tensor]]  # losses, weighted, by name


def pixel_objective(
    teacher: fx.GraphModule,
    settings: PixelSynthesis,
    shape: tuple[int, ...],
    *,
    labels: Tensor | None,
    second: Tensor | None = None,
    targets: Targets | None,
    rng: torch.Generator,
    prior: InputPrior,
) -> Callable[[Tensor], dict[str, Tensor]]:
    """What pixels are optimised for: images (N, C, H, W) -> the parts of the loss, weighted, by name.

    Settings whose views are to agree take two views of the images, (2N, C, H, W), one after the other.

    Args: as for `optimise_pixels`; `shape` is that of the batch.

    Raises:
        UsageError: the settings ask for the statistics of BatchNorm layers and the teacher has none.
    """
    classes, device = settings.classes, device_of(teacher)
    distant = classes is not None and classes.distance_weight > 0
    agreement = settings.views.agreement if settings.views is not None else 0.0
    observer = observe(
        teacher,
        logits=classes is not None or agreement > 0,
        embedding=distant,
        fold=True,
        statistics=settings.bn is not None,
        patches=settings.patches is not None,
    )
    reduced = computing_in(settings.precision, device)
    centre, scale = (constant(v, device).view(-1, 1, 1) for v in prior.of(shape[1]))
    parts: list[Part] = []
    if classes is not None:
        assert labels is not None
        views = 2 if agreement > 0 else 1
        parts.append(class_losses(teacher, classes, labels, second, rng, views=views))
    match = None if settings.bn is None else with_units(settings.bn, teacher)
    if match is not None:
        slack = _slack(observer, match, shape, rng, device, prior)
        parts.insert(0, _weighted("bn", match.weight, StatisticsDistance(match, slack)))
    if settings.image_weight > 0:
        parts.append(_weighted("image", settings.image_weight, InputStatistics(prior)))
    if settings.texture_weight > 0:
        gains = texture_gains(shape[2], shape[3], device)
        natural = natural_energies(shape[2], shape[3], gains)
        parts.append(
            _weighted(
                "texture",
                settings.texture_weight,
                lambda f: texture_distance(texture_energies(f.images.float(), gains), natural),
            )
        )
    if settings.centres is not None and match is not None and targets is not None:
        to_centres = StatisticsDistance(replace(match, shallow=0.0, deep=1.0))
        centres = settings.centres.weight
        parts.append(_weighted("centres", centres, lambda f: to_centres(with_targets(f, targets))))
    if settings.patches is not None:
        parts.append(_weighted("patches", settings.patches.weight, _likeness(settings.patches)))
    if settings.smoothness is not None:
        smooth = settings.smoothness
        wanted = smooth.lowest + (smooth.highest - smooth.lowest) * float(torch.rand((), generator=rng))
        parts.append(
            _weighted("smoothness", smooth.weight, lambda f: (variation(f.images / scale) - wanted).abs())
        )
    if settings.norm_weight > 0:
        parts.append(
            _weighted("norm", settings.norm_weight, lambda f: mean_square((f.images - centre) / scale))
        )
    if agreement > 0:
        parts.append(_weighted("agreement", agreement, _disagreement))

    def objective(images: Tensor) -> dict[str, Tensor]:
        with reduced:
            forward = observer(images)
        return {name: loss for part in parts for name, loss in part(forward).items()}

    return objective


def _weighted(name: str, weight: float, loss: Callable[[ForwardPass], Tensor]) -> Part:
    return lambda forward: {name: weight * loss(forward)}


def _likeness(settings: PatchSimilarity) -> Callable[[ForwardPass], Tensor]:
    """Minus the entropy of the patches' similarities, summed over attentions."""

    def loss(forward: ForwardPass) -> Tensor:
        entropies = [
            similarity_entropy(
                patch_cosines(features, len(forward.images)),
                points=settings.points,
                bandwidth=settings.bandwidth,
            )
            for features in forward.patches
        ]
        zero = torch.zeros((), device=forward.images.device)
        return -torch.stack([zero, *entropies]).sum()

    return loss


def _disagreement(forward: ForwardPass) -> Tensor:
    assert forward.logits is not None
    first, second = forward.logits.chunk(2)
    return disagreement(first, second)


def _slack(
    observer: Observer,
    match: StatisticsMatch,
    shape: tuple[int, ...],
    rng: torch.Generator,
    device: torch.device,
    prior: InputPrior,
) -> list[tuple[Tensor, Tensor]] | None:
    if match.slack == 0:
        return None
    noise = prior.apply(torch.randn(shape, generator=rng).to(device))
    with torch.no_grad():
        return slack_of(observer(noise), match)
