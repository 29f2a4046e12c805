"""Where the minibatches of fine-tuning come from: images that there are, or a generator trained in turns."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq.distributed import Group
from zsq.images.generator_training import GeneratorTraining
from zsq.recover.learn_unit import minibatches
from zsq.recover.network_outputs import Observed
from zsq.recover.settings import Adaptability
from zsq.recover.student_losses import adaptability_bounds, relative_agreement
from zsq.recover.unit_tensors import take


@dataclass(frozen=True)
class Minibatch:
    """The images of one step, of all processes.

    Attributes:
        images: (N, C, H, W), normalised, channels-last, without history; as they are before any view.
        labels: (N,) int64.
        index: (N,), which of the images that there are; None if they are new.
        logits: (N, K), the teacher's of the images as they are, if they are known.
        parts: of the loss of the generator that made them, to be logged; "loss" is their sum.
    """

    images: Tensor
    labels: Tensor
    index: Tensor | None
    logits: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


def of_images(images: Tensor, labels: Tensor, batch_size: int, rng: torch.Generator) -> Iterator[Minibatch]:
    """Endless minibatches of images that there are, drawn without replacement within a pass."""
    for chosen in minibatches(len(images), batch_size, rng):
        index = chosen.to(images.device)
        yield Minibatch(take(images, index), labels[index], index)


def of_generator(
    training: GeneratorTraining,
    student: Observed,
    batch_size: int,
    rng: torch.Generator,
    *,
    adaptability: Adaptability | None,
    lr_factor: float,
    group: Group,
) -> Iterator[Minibatch]:
    """Endless minibatches of a generator, which takes a step for each, against the student as it then is.

    Args:
        training: changed in place.
        student: whose logits `adaptability` looks at; none of its parameters gets a gradient.
        batch_size: of a minibatch.
        rng: on the CPU.
        adaptability: None holds the images to the teacher alone.
        lr_factor: of the generator's learning rate.
        group: all make the same images.
    """

    def game(images: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        assert adaptability is not None
        return adaptability_loss(student.logits(images).float(), teacher_logits, labels, adaptability)

    class_loss = None if adaptability is None else game
    while True:
        made = training.step(batch_size, rng, class_loss=class_loss, lr_factor=lr_factor, group=group)
        yield Minibatch(made.images, made.labels, None, made.logits, made.parts)


def adaptability_loss(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, settings: Adaptability
) -> dict[str, Tensor]:
    """Parts of a generator's loss, weighted, by name: both bounds, class of the difference and of the sum.

    Args:
        logits, teacher_logits: (N, K), with history to the images.
        labels: (N,) int64.
        settings: weights and bounds.

    Source: AdaDFQ (arXiv:2303.06869), loss of the generator, as in its code.
    """
    bounds = adaptability_bounds(
        relative_agreement(logits, teacher_logits), lowest=settings.lowest, highest=settings.highest
    )
    apart, together = (F.cross_entropy(z, labels) for z in (teacher_logits - logits, teacher_logits + logits))
    return {
        "bounds": bounds,
        "disagreement": settings.weight * settings.disagreement * apart,
        "agreement": settings.weight * settings.agreement * together,
    }
