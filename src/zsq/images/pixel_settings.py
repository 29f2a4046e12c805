"""Settings of images that are optimised as pixels."""

from dataclasses import dataclass, field
from typing import Literal

from zsq.errors import UsageError
from zsq.images.class_settings import ClassGuide
from zsq.images.look_settings import Cosine, PatchSimilarity, Smoothness, Views
from zsq.images.setting_checks import Units, at_least, check_units, one_of, plateau_factor
from zsq.images.settings import Synthesis


@dataclass(frozen=True, kw_only=True)
class StatisticsMatch:
    """How the statistics that the images give are held to those that BatchNorm layers stored.

    Attributes:
        weight: factor of the distance.
        spread: what is compared beside the mean: the "deviation" or the "variance" (biased) of a channel.
        over: statistics of all images of a "batch" together, or of each "image" on its own (then averaged).
        channels: "mean" or "sum" of a layer's squared gaps over its channels.
        layers: "mean" or "sum" over the layers.
        shallow, deep: factors of the layers before and from number L // 2 - 1 on (from 0, of L).
        slack: gaps up to this quantile (over a layer's channels) of those that Gaussian noise gives cost
            nothing; 0 for none.
        enhance: count layer i mod L twice for image i of a batch; needs over="image".
        units: of the gaps: "activations" (published), "deviations" of the layer, or "auto", see `Units`.
    """

    weight: float = 1.0
    spread: Literal["deviation", "variance"] = "deviation"
    over: Literal["batch", "image"] = "batch"
    channels: Literal["mean", "sum"] = "mean"
    layers: Literal["mean", "sum"] = "sum"
    shallow: float = 1.0
    deep: float = 1.0
    slack: float = 0.0
    enhance: bool = False
    units: Units = field(default="auto", metadata={"described": "unless default"})

    def __post_init__(self) -> None:
        check_units("synthesis.bn.units", self.units)
        at_least(0, "synthesis.bn", self, ("weight", "shallow", "deep"))
        one_of("synthesis.bn.spread", self.spread, ("deviation", "variance"))
        one_of("synthesis.bn.over", self.over, ("batch", "image"))
        for name in ("channels", "layers"):
            one_of(f"synthesis.bn.{name}", getattr(self, name), ("mean", "sum"))
        if not 0 <= self.slack <= 1:
            raise UsageError(f"synthesis.bn.slack is {self.slack}. Expected a quantile, 0 to 1.")
        if self.enhance and self.over != "image":
            raise UsageError(
                "synthesis.bn.enhance weighs the layers differently for each image, which needs statistics "
                "of each image. Give synthesis.bn.over=image too."
            )


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Show the teacher random crops, enlarged to the full size, and mirror images.

    Attributes:
        prob: probability that a step does so (then for all images, each with a crop of its own).
        smallest: smallest share of the area that a crop keeps.
    """

    prob: float = 0.5
    smallest: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1 or not 0 < self.smallest <= 1:
            raise UsageError(
                f"synthesis.crops.prob is {self.prob} and synthesis.crops.smallest {self.smallest}. Expected "
                "a probability and a share of the area above 0."
            )


@dataclass(frozen=True, kw_only=True)
class Centres:
    """One image a class is made first; in the deeper layers their statistics are targets for the others.

    Attributes:
        classes: at most so many classes, drawn at random, have one; None (published): every class. Generators
            that make images of classes need all.
        weight: factor of the distance to the statistics of the centres.
        steps: optimizer steps of the centres.
        lr_min: the learning rate of the centres never falls below it.
        class_weight: factor of their cross-entropy.
        shallow, deep: factors of their BatchNorm distance, see `StatisticsMatch`.
        texture_weight: factor of the distance of each one's texture energies to those of natural images.
    """

    classes: int | None = field(default=None, metadata={"described": "unless default"})
    weight: float = 0.02
    steps: int = 1500
    lr_min: float = 0.05
    class_weight: float = 5.0
    shallow: float = 0.2
    deep: float = 1.1
    texture_weight: float = field(default=0.0, metadata={"described": "unless default"})

    def __post_init__(self) -> None:
        at_least(1, "synthesis.centres", self, ("steps",) if self.classes is None else ("steps", "classes"))
        names = ("weight", "lr_min", "class_weight", "shallow", "deep", "texture_weight")
        at_least(0, "synthesis.centres", self, names)


@dataclass(frozen=True, kw_only=True)
class PixelSynthesis:
    """Images whose pixels are optimised themselves, batch by batch, from Gaussian noise.

    Attributes:
        num_images: how many.
        batch_size: images that are optimised together.
        steps: optimizer steps a batch.
        start: "white" noise (published), or noise with the power spectrum of photographs ("natural").
        lr: Adam, pixels, in deviations of the expected images.
        momentum, square_decay: Adam's decay rates of the gradient and of its square.
        plateau_factor: factor of `lr` when the loss has not fallen for `plateau_patience` steps.
        plateau_patience: see `plateau_factor`.
        lr_min: `lr` never falls below it, unless it starts there.
        cosine: a schedule in place of the plateau's three settings; None for the plateau.
        limit: pixels are cut to so many deviations after each step; 0 leaves them.
        valid_pixels: cut them to what black and white are, too.
        image_weight: factor of the distance of each image to the expected mean and deviation.
        texture_weight: factor of the distance of each image's texture energies to those of natural images.
        norm_weight: factor of the mean square of pixels (the L2 prior of DeepInversion), in deviations from
            the expected mean; 0 leaves it out.
        precision: of the teacher's convolutions and matrix products; the rest is float32.
        bn: match of the BatchNorm statistics; None for networks without them.
        classes: what is asked of an image's class; None: images have no class.
        patches: what is asked of attention; None: nothing.
        smoothness: None leaves neighbouring pixels alone.
        views: None shows the images as they are.
        crops: None shows the images as they are.
        centres: None has no targets but those of the BatchNorm layers.
    """

    num_images: int = 5120
    batch_size: int = 256
    steps: int = 1000
    lr: float = 0.5
    plateau_factor: float = 0.1
    plateau_patience: int = 50
    lr_min: float = 1e-4
    limit: float = 0.0
    image_weight: float = 0.0
    texture_weight: float = field(default=0.0, metadata={"described": "unless default"})
    precision: Literal["float32", "bfloat16"] = "float32"
    norm_weight: float = field(default=0.0, metadata={"described": "unless default"})
    momentum: float = field(default=0.9, metadata={"described": "unless default"})
    square_decay: float = field(default=0.999, metadata={"described": "unless default"})
    start: Literal["white", "natural"] = field(default="white", metadata={"described": "unless default"})
    cosine: Cosine | None = None
    valid_pixels: bool = field(default=False, metadata={"described": "unless default"})
    bn: StatisticsMatch | None = field(default_factory=StatisticsMatch)
    classes: ClassGuide | None = None
    patches: PatchSimilarity | None = None
    smoothness: Smoothness | None = None
    views: Views | None = None
    crops: Crops | None = None
    centres: Centres | None = None

    def __post_init__(self) -> None:
        lowest = 2 if self.bn is not None and self.bn.over == "batch" else 1
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < lowest:
                raise UsageError(
                    f"synthesis.{name} is {getattr(self, name)}. Expected at least {lowest}"
                    + (": the joint statistics of a batch are what is optimised." if lowest == 2 else ".")
                )
        at_least(1, "synthesis", self, ("steps", "plateau_patience"))
        at_least(
            0, "synthesis", self, ("lr", "lr_min", "limit", "image_weight", "texture_weight", "norm_weight")
        )
        plateau_factor("synthesis", self.plateau_factor)
        one_of("synthesis.precision", self.precision, ("float32", "bfloat16"))
        one_of("synthesis.start", self.start, ("white", "natural"))
        for name in ("momentum", "square_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"synthesis.{name} is {getattr(self, name)}. Expected 0 or more, below 1.")
        if self.centres is not None and self.bn is None:
            raise UsageError(
                "synthesis.centres sets targets for the statistics of BatchNorm layers, but synthesis.bn is "
                "none. Give synthesis.bn=on too, or synthesis.centres=none."
            )
        if self.centres is not None and self.classes is None:
            raise UsageError(
                "synthesis.centres makes an image of every class, but synthesis.classes is none. Give "
                "synthesis.classes=on too."
            )


MadeInBatches = Synthesis | PixelSynthesis


def needs_statistics(settings: object) -> bool:
    """Whether images of these settings are made from the statistics that BatchNorm layers stored."""
    return isinstance(settings, Synthesis) or (
        isinstance(settings, PixelSynthesis) and settings.bn is not None
    )
