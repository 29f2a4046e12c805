"""Settings of what images are to look like, whatever a network has stored of its training data."""

from dataclasses import dataclass

from zsq.errors import UsageError
from zsq.images.setting_checks import at_least

MAX_VARIETY = 0.8  # share of the variance of pixels that may lie between images


@dataclass(frozen=True, kw_only=True)
class PatchSimilarity:
    """The patches of an image are to differ: entropy of their similarities, in every attention.

    A network without attention leaves it out.

    Attributes:
        weight: factor of minus the entropy, summed over the attentions.
        points: where the density of the cosines is estimated, between the lowest and the highest.
        bandwidth: of the estimate's Gaussian kernel.
    """

    weight: float = 1.0
    points: int = 10
    bandwidth: float = 0.01

    def __post_init__(self) -> None:
        at_least(0, "synthesis.patches", self, ("weight",))
        at_least(2, "synthesis.patches", self, ("points",))
        if not self.bandwidth > 0:
            raise UsageError(f"synthesis.patches.bandwidth is {self.bandwidth}. Expected above 0.")


@dataclass(frozen=True, kw_only=True)
class Smoothness:
    """Neighbouring pixels are to differ as much as in photographs.

    Attributes:
        weight: factor of the distance between the images' variation and its target.
        lowest, highest: the target is uniform between them, drawn once a batch: root mean square difference
            of neighbours, averaged over four directions, in deviations of the expected images.
    """

    weight: float = 438.0
    lowest: float = 0.285
    highest: float = 0.342

    def __post_init__(self) -> None:
        at_least(0, "synthesis.smoothness", self, ("weight",))
        if not 0 <= self.lowest <= self.highest:
            raise UsageError(
                f"synthesis.smoothness.lowest is {self.lowest} and synthesis.smoothness.highest "
                f"{self.highest}. Expected 0 <= lowest <= highest."
            )


@dataclass(frozen=True, kw_only=True)
class Views:
    """Show the teacher the images moved around the edge and mirrored, another way in every step.

    Attributes:
        jitter: largest shift, as a share of the side; along both axes alike.
        mirror: probability of a mirror image.
        agreement: factor of the distance between what the teacher says to two views; 0 shows only one.
    """

    jitter: float = 0.134
    mirror: float = 0.5
    agreement: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, "synthesis.views", self, ("agreement",))
        if not (0 <= self.jitter <= 0.5 and 0 <= self.mirror <= 1):
            raise UsageError(
                f"synthesis.views.jitter is {self.jitter} and synthesis.views.mirror {self.mirror}. Expected "
                "a share of the side up to 0.5 and a probability."
            )


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """The learning rate rises linearly, then falls to 0 along half a cosine, in each of some rounds.

    Attributes:
        rounds: how many; views move the further the later the round, the full way in the last.
        warmup: share of a round in which the rate rises.
    """

    rounds: int = 2
    warmup: float = 0.2

    def __post_init__(self) -> None:
        at_least(1, "synthesis.cosine", self, ("rounds",))
        if not 0 <= self.warmup < 1:
            raise UsageError(f"synthesis.cosine.warmup is {self.warmup}. Expected a share of a round.")


@dataclass(frozen=True, kw_only=True)
class Variety:
    """Images differ in brightness, tint and contrast as photographs do; each is held to what is drawn for it.

    In the units of the images' expected deviation. Where every single image has mean 0 and deviation 1, as
    published, what later layers give for different images is too much alike: on cifar10_resnet20s the means
    of a channel over an image vary by 3 % (images) to 70 % (last layers) of what they do for photographs.

    Of 1000 CIFAR-10, 1000 CIFAR-100 and 300 ImageNet photographs brightness is 0.49, 0.55 and 0.41, tint
    0.21, 0.27 and 0.20, contrast 0.23 (around 0.81, 0.75 and 0.86).

    Attributes:
        brightness: deviation, over images, of the mean of all their channels.
        tint: deviation of a channel's mean from that of its image.
        contrast: deviation, over images, of the deviation within an image. Its mean is what leaves all pixels
            together deviation 1.
    """

    brightness: float = 0.45
    tint: float = 0.2
    contrast: float = 0.23

    def __post_init__(self) -> None:
        at_least(0, "synthesis.variety", self, ("brightness", "tint", "contrast"))
        if self.brightness**2 + self.tint**2 + self.contrast**2 > MAX_VARIETY:
            raise UsageError(
                f"synthesis.variety.brightness is {self.brightness}, tint {self.tint} and contrast "
                f"{self.contrast}. Expected squares that add up to at most {MAX_VARIETY}: what differs "
                "between images is a part of the expected variance, 1, of all their pixels."
            )
