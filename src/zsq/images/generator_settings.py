"""Settings of images that one generator makes, class by class."""

from dataclasses import dataclass, field
from typing import Literal

from zsq.errors import UsageError
from zsq.images.pixel_settings import Centres, StatisticsMatch
from zsq.images.setting_checks import at_least, one_of, share_of_second


@dataclass(frozen=True, kw_only=True)
class GeneratorSynthesis:
    """Images of classes from one generator, which is trained on the teacher; fine-tuning may train it on.

    Attributes:
        num_images: drawn once it is trained so far; ranges are calibrated on them.
        batch_size: images a step, whose joint statistics are matched.
        steps: of its training on the teacher alone, before there is a student with ranges.
        latent_size: length of a latent vector.
        condition: how it learns of the class. "input": the latent is multiplied by a vector of the class;
            "norms": scale and shift of its BatchNorms are those of the class. All of these are learned.
        lr: Adam.
        beta1: of it.
        class_weight: factor of the cross-entropy of the class.
        second_share: as in `ClassGuide`; what the generator learns of the class is mixed in the same shares.
        precision: of convolutions and matrix products; statistics and parameters are always float32. A
            student in turns that sees the images as they are learns from the logits of this pass.
        bn: match of the BatchNorm statistics.
        centres: None has no targets but those of the BatchNorm layers. Else one image a class is made first,
            as pixels, and each image is held to what the deeper layers receive for the centre of its class.
    """

    num_images: int = 2000
    batch_size: int = 200
    steps: int = 800
    latent_size: int = 100
    condition: Literal["input", "norms"] = "input"
    lr: float = 1e-3
    beta1: float = 0.5
    class_weight: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    bn: StatisticsMatch = field(
        default_factory=lambda: StatisticsMatch(weight=0.1, spread="variance", layers="mean")
    )
    centres: Centres | None = None
    second_share: float = field(default=0.0, metadata={"described": "unless default"})

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 2:
                raise UsageError(
                    f"synthesis.{name} is {getattr(self, name)}. Expected at least 2: the joint "
                    "statistics of the images of a batch are what is optimised."
                )
        at_least(1, "synthesis", self, ("steps", "latent_size"))
        at_least(0, "synthesis", self, ("lr", "class_weight"))
        if not 0 <= self.beta1 < 1:
            raise UsageError(f"synthesis.beta1 is {self.beta1}. Expected a number from 0 to below 1.")
        share_of_second("synthesis.second_share", self.second_share)
        if self.centres is not None and self.centres.classes is not None:
            raise UsageError(
                f"synthesis.centres.classes is {self.centres.classes}, and each image of a generator is held "
                "to the centre of its class. Leave it at none, or give synthesis.centres=none."
            )
        if self.second_share > 0 and self.centres is not None:
            raise UsageError(
                f"synthesis.second_share is {self.second_share}, and synthesis.centres holds an image to one "
                "image of one class. Give synthesis.centres=none, or synthesis.second_share=0."
            )
        one_of("synthesis.condition", self.condition, ("input", "norms"))
        one_of("synthesis.precision", self.precision, ("float32", "bfloat16"))
        if self.bn.slack > 0:
            raise UsageError(
                f"synthesis.bn.slack is {self.bn.slack}, which images of a generator do not have. Give "
                "synthesis.bn.slack=0, or take images that are optimised as pixels (dsg)."
            )
