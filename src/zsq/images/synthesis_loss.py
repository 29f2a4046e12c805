"""The loss of images that a generator makes from latents."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from zsq.images.class_losses import ClassLosses, class_losses
from zsq.images.forward import ForwardPass, resolved_units
from zsq.images.losses import BatchNormStatistics, InputStatistics, Looks
from zsq.images.prior import InputPrior
from zsq.images.settings import Synthesis


@dataclass(frozen=True)
class SynthesisLoss:
    """Sum over BatchNorm layers of `bn_statistics_distance`, plus `InputStatistics`, plus losses of classes.

    Attributes:
        settings: weights.
        image: what single images are held to.
        classes: what is asked of their classes; None: nothing.
        bn: match of the BatchNorm statistics.
    """

    settings: Synthesis
    image: InputStatistics
    classes: ClassLosses | None = None
    bn: BatchNormStatistics = BatchNormStatistics()

    def __call__(self, forward: ForwardPass) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, weighted, and its parts by name: those of BatchNorm and images without their weights."""
        parts = {"bn": self.bn(forward), "image": self.image(forward)}
        loss = self.settings.bn_weight * parts["bn"] + self.settings.image_weight * parts["image"]
        for name, part in ({} if self.classes is None else self.classes(forward)).items():
            loss, parts[name] = loss + part, part
        return loss, parts


def needs(settings: Synthesis) -> dict[str, bool]:
    """What such a loss has to be shown of the teacher: arguments of `observe`."""
    classes = settings.classes
    return {"logits": classes is not None, "embedding": classes is not None and classes.distance_weight > 0}


def synthesis_loss(
    teacher: fx.GraphModule,
    settings: Synthesis,
    prior: InputPrior,
    *,
    looks: Looks | None,
    labels: Tensor | None,
    second: Tensor | None,
    rng: torch.Generator,
) -> SynthesisLoss:
    """The loss of a batch, with what its single images are held to.

    Args:
        teacher: captured network, on the device to compute on.
        settings: how images are made.
        prior: their expected mean and deviation.
        looks: what each image is held to in the place of that; None without variety.
        labels: (N,), int64; needed if the settings ask for classes.
        second: (N,), int64; needed if they ask for second classes.
        rng: on the CPU; draws what classes need.
    """
    classes = None
    if settings.classes is not None:
        assert labels is not None
        classes = class_losses(teacher, settings.classes, labels, second, rng)
    bn = BatchNormStatistics(relative=resolved_units(teacher, settings.bn_units) == "deviations")
    return SynthesisLoss(settings, InputStatistics(prior, looks), classes, bn)
