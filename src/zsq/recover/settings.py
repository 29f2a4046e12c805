"""Settings of fine-tuning: how a student is trained end to end, and against what."""

from dataclasses import dataclass, field
from typing import Literal

from zsq.errors import UsageError
from zsq.images.settings import LowPass


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Kullback-Leibler divergence of the student's softened class probabilities from the teacher's.

    Attributes:
        weight: factor, besides the square of the temperature.
        temperature: by which the logits of both are divided.
        mean: "batch" sums over classes and averages over images (weight 20 in IntraQ, HAST, SynQ); "elements"
            also divides by the number of classes (weight 1 in GDFQ). The second is that much smaller.
    """

    weight: float = 20.0
    temperature: float = 20.0
    mean: Literal["batch", "elements"] = "batch"

    def __post_init__(self) -> None:
        _positive(distillation_temperature=self.temperature)
        if self.mean not in ("batch", "elements"):
            raise UsageError(f"distillation.mean is {self.mean!r}. Expected batch or elements.")


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Negative entropy of the softened difference of the two networks' logits (AdaSG, AdaDFQ).

    Attributes:
        weight: factor, besides the square of the temperature.
        temperature: by which the difference is divided.
    """

    weight: float = 1.0
    temperature: float = 20.0

    def __post_init__(self) -> None:
        _positive(agreement_temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class ClassLabels:
    """Cross-entropy with the images' classes, for images that the teacher finds easy.

    Attributes:
        weight: factor.
        threshold: images whose difficulty, 1 minus the teacher's probability of their class, is above it have
            soft labels only; 1 leaves out none. SynQ takes 0.5, and searched 0.5 to 0.7.
    """

    weight: float = 1.0
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"labels.threshold is {self.threshold}. Expected a number from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class MapAlignment:
    """Distance between the class activation maps (Grad-CAM) of student and teacher (SynQ).

    Attributes:
        weight: factor. SynQ's code: 200, for ResNet-18 at 3 bits 50; searched 20 to 2000.
        channels: "all" weighs every channel by its slope and keeps where the sum is positive (the paper);
            "positive" drops channels of negative slope (the code).
    """

    weight: float = 50.0
    channels: Literal["all", "positive"] = "all"

    def __post_init__(self) -> None:
        if self.channels not in ("all", "positive"):
            raise UsageError(f"maps.channels is {self.channels!r}. Expected all or positive.")


@dataclass(frozen=True, kw_only=True)
class FeatureAlignment:
    """Distance between the channel attentions of student and teacher, block by block (HAST).

    Attributes:
        weight: factor of the sum over blocks. HAST: 1000 CIFAR-10, 2000 CIFAR-100, 4000 ImageNet.
    """

    weight: float = 1000.0


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """Train also on images moved a small step up the slope of the loss (HAST).

    Attributes:
        weight: factor of the loss on the moved images.
        size: of the step in every pixel, in units of normalised images. HAST: 0.01, CIFAR-100 0.02.
    """

    weight: float = 1.0
    size: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Adaptability:
    """How a generator is to make images on which student and teacher neither agree nor disagree too much.

    In the place of the class loss: both bounds, and `weight` times the two class losses (AdaDFQ; AdaSG has
    0.1 for both of them).

    Attributes:
        lowest, highest: agreement of an image that costs nothing, see `relative_agreement`.
        weight: of both class losses.
        disagreement: factor of the cross-entropy of the class from the difference of the two logits.
        agreement: the same from their sum.
    """

    lowest: float = 0.1
    highest: float = 0.8
    weight: float = 1.0
    disagreement: float = 0.2
    agreement: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.lowest <= self.highest <= 1:
            raise UsageError(
                f"adaptability.lowest is {self.lowest} and adaptability.highest {self.highest}. Expected "
                "0 <= lowest <= highest <= 1."
            )


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Train the generator that made the images on: a step of it before each of the student's.

    The student's step is on the images that the generator made for its own. Its loss is that of `synthesis`,
    its learning rate falls as the student's does.

    Attributes:
        adaptability: what the student has to do with it; None: the teacher alone says what is good.
    """

    adaptability: Adaptability | None = None


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """Every image is mixed with another one of its minibatch; it keeps the label of the larger share (TexQ).

    Attributes:
        smallest: share of the image itself, uniform from here to 1, drawn for each.
    """

    smallest: float = 0.5

    def __post_init__(self) -> None:
        if not 0.5 <= self.smallest <= 1:
            raise UsageError(f"mixup.smallest is {self.smallest}. Expected a share from 0.5 to 1.")


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Train all float parameters of the student on the images, end to end, against the teacher.

    Trained are float weights behind straight-through rounding, biases and the affine part of BatchNorm; the
    running statistics of BatchNorm never change. From a student that is rounded to nearest, the weights start
    as the teacher's. From a reconstructed one, whose roundings are decided, they start as what its codes
    stand for, so that the first step sees the reconstructed student itself; codes then turn late (on six
    convolutions none did in 40 steps at 3e-4), and BatchNorm and biases move first. cifar10_resnet20, W3A3,
    60 steps of reconstruction a unit, 100 of distillation at 3e-5, 2000 test images, seed 0: 86.0 before and
    after, while the loss falls by a tenth. Started from the teacher's weights within the same codes, 3 % of
    the codes turned, and it was 82.3.

    At 8 bits nothing is fine-tuned.

    Attributes:
        epochs: of `iterations` minibatches each; an epoch is not a pass over the images.
        iterations: see `epochs`.
        batch_size: images a step, drawn without replacement within a pass over the images.
        lr: SGD with Nesterov momentum, at the start.
        momentum: of it.
        weight_decay: of all that is trained.
        lr_decay: factor of `lr` after every `lr_decay_epochs` epochs.
        lr_decay_epochs: see `lr_decay`.
        lr_decays: how often it decays at most.
        clip: gradients are scaled down so that lr times them, all together, is at most this share of the
            norm of all that is trained, see `clip_to_share`; None (published) takes them as they are.
        undo_rise: an epoch in which the mean loss is above that before training, by more than this share of
            it and chance, is undone as soon as that is seen, and the rate is a third from there on, at most
            five times;
            with `turns`, where images change, only one whose loss is not finite. The first steps at too
            large a rate move a student so far that what comes after fits it to the images alone:
            cifar100_resnet20s, W4A4, hast at the quick budget, 24.5 before, 3.9 after.
        ranges: "kept": scales and zero points of the calibrated or reconstructed student. "minmax" (GDFQ and
            those built on it): of weights, lowest and highest value per output channel, anew in every step;
            of activations, a moving average of them over one pass, then fixed. A reconstructed student
            keeps what it has learned in any case.
        range_momentum: of the moving average of activation ranges.
        augment: random crops and flips, drawn anew for every image and step.
        crop_scale: smallest share of an image's area that a crop has.
        saturated_gradients: activations beyond their range pass the gradient on, as in published code, though
            they cannot change what comes after them; weights before them may then grow without bound.
        precision: of the teacher's convolutions and matrix products; the student is always in float32.
        low_pass: Gaussian filter of the images, after the augmentation.
        distillation: soft labels of the teacher.
        agreement: another form of them.
        labels: hard labels.
        maps: class activation maps.
        features: channel attentions.
        perturbation: steps up the slope; its loss has all parts but the maps.
        turns: the images of every step are new ones of a generator that is trained too; None takes those that
            there are.
        mixup: of the images, before augmentation and filter.
    """

    epochs: int = 100
    iterations: int = 200
    batch_size: int = 256
    lr: float = 1e-5
    momentum: float = 0.9
    weight_decay: float = 1e-4
    lr_decay: float = 0.1
    lr_decay_epochs: int = 20
    lr_decays: int = 3
    clip: float | None = field(default=None, metadata={"described": "unless default"})
    undo_rise: float = field(default=0.2, metadata={"described": "unless default"})
    ranges: Literal["kept", "minmax"] = "kept"
    range_momentum: float = 0.9
    augment: bool = True
    crop_scale: float = 0.5
    saturated_gradients: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    low_pass: LowPass | None = None
    distillation: Distillation | None = field(default_factory=Distillation)
    agreement: Agreement | None = None
    labels: ClassLabels | None = None
    maps: MapAlignment | None = None
    features: FeatureAlignment | None = None
    perturbation: Perturbation | None = None
    turns: Turns | None = None
    mixup: Mixup | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "iterations", "batch_size", "lr_decay_epochs"):
            if getattr(self, name) < 1:
                raise UsageError(f"fine_tuning.{name} is {getattr(self, name)}. Expected at least 1.")
        for name in ("momentum", "range_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(
                    f"fine_tuning.{name} is {getattr(self, name)}. Expected a number from 0 to below 1."
                )
        if self.clip is not None and not self.clip > 0:
            raise UsageError(f"fine_tuning.clip is {self.clip}. Expected above 0, or none.")
        if not self.undo_rise >= 0:
            raise UsageError(f"fine_tuning.undo_rise is {self.undo_rise}. Expected at least 0.")
        if not 0 < self.crop_scale <= 1:
            raise UsageError(f"fine_tuning.crop_scale is {self.crop_scale}. Expected above 0, at most 1.")
        if self.ranges not in ("kept", "minmax"):
            raise UsageError(f"fine_tuning.ranges is {self.ranges!r}. Expected kept or minmax.")
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"fine_tuning.precision is {self.precision!r}. Expected float32 or bfloat16.")
        losses = (self.distillation, self.agreement, self.labels, self.maps, self.features)
        if all(loss is None for loss in losses):
            raise UsageError(
                "fine_tuning has no loss: distillation, agreement, labels, maps and features are all none. "
                "Put one in, e.g. --set fine_tuning.distillation=on."
            )


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{name.replace('_', '.', 1)} is {value}. Expected above 0.")
