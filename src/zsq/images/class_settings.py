"""Settings of what images of a class are to be to the teacher."""

from dataclasses import dataclass, field
from typing import Literal

from zsq.errors import UsageError
from zsq.images.setting_checks import at_least, one_of, share_of_second


@dataclass(frozen=True, kw_only=True)
class ClassGuide:
    """Every image is of a class, all classes equally often; how the teacher is to see it.

    Attributes:
        loss: "cross_entropy" of the class, or "probability": squared distance of its probability to a target.
        weight: factor of that loss.
        hardness: exponent g of (1 - p)^g, by which an image's cross-entropy counts; p its probability of the
            class. 0 counts all alike, more counts those the more that the teacher doubts.
        soft_share: share of the images whose target of "probability" is drawn; that of the others is 1.
        soft_lowest: drawn targets are uniform between it and 1.
        distance_weight: factor of the distance constraint; 0 leaves it out.
        distance_min, distance_max: where the cosine distance between an image's last features and the mean of
            those of the other images of its class costs nothing.
        second_share: probability that the teacher is to give to a second class of each image, which differs
            from its first; the first has the rest and stays its label. 0: one class an image. With the
            cross-entropy alone.
    """

    loss: Literal["cross_entropy", "probability"] = "cross_entropy"
    weight: float = 1.0
    hardness: float = 0.0
    soft_share: float = 0.5
    soft_lowest: float = 1.0
    distance_weight: float = 0.0
    distance_min: float = 0.0
    distance_max: float = 2.0
    second_share: float = field(default=0.0, metadata={"described": "unless default"})

    def __post_init__(self) -> None:
        one_of("synthesis.classes.loss", self.loss, ("cross_entropy", "probability"))
        at_least(0, "synthesis.classes", self, ("weight", "hardness", "distance_weight"))
        for name in ("soft_share", "soft_lowest"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"synthesis.classes.{name} is {getattr(self, name)}. Expected 0 to 1.")
        if not 0 <= self.distance_min <= self.distance_max <= 2:
            raise UsageError(
                f"synthesis.classes.distance_min is {self.distance_min} and synthesis.classes.distance_max "
                f"{self.distance_max}. Expected cosine distances, 0 <= distance_min <= distance_max <= 2."
            )
        share_of_second("synthesis.classes.second_share", self.second_share)
        if self.second_share > 0 and self.loss != "cross_entropy":
            raise UsageError(
                f"synthesis.classes.second_share is {self.second_share}, which goes with the cross-entropy, "
                f"but synthesis.classes.loss is {self.loss!r}. Give synthesis.classes.loss=cross_entropy too."
            )
