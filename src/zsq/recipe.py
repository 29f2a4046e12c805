"""A recipe: one frozen dataclass for every stage, in pipeline order. A paper's method is a composition."""

from dataclasses import dataclass, field
from typing import Literal

from zsq.errors import UsageError
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import PixelSynthesis
from zsq.images.prompts import TextToImage
from zsq.images.settings import Filter, LowPass, Refinement, Synthesis
from zsq.quant.scheme import Scheme
from zsq.recover.settings import FineTuning, MapAlignment


@dataclass(frozen=True, kw_only=True)
class GaussianNoise:
    """Images of independent normal pixels of the expected mean and deviation: a baseline.

    Attributes:
        num_images: how many.
    """

    num_images: int = 1024

    def __post_init__(self) -> None:
        _at_least(1, synthesis_num_images=self.num_images)


@dataclass(frozen=True, kw_only=True)
class GivenImages:
    """Images that the user brings (`--images`): real ones as a reference, or any other set.

    Attributes:
        num_images: how many of them are used, drawn at random; 0 for all.
    """

    num_images: int = 1024


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How activation ranges are chosen before they are learned or frozen.

    Attributes:
        num_images: images observed, the first ones of the set.
        method: "error" (least p-norm error of rounding), "minmax" or "percentile".
        symmetric: zero point 0 (or mid-range if any value is negative); False: any zero point, which saves
            most of a bit where values are one-sided but for a few (after a BatchNorm, a SiLU, an addition).
        exponent: p of "error".
        percentile: share of values that "percentile" keeps inside the range.
    """

    num_images: int = 128
    method: str = "error"
    symmetric: bool = False
    exponent: float = 2.4
    percentile: float = 0.999

    def __post_init__(self) -> None:
        if self.method not in ("error", "minmax", "percentile"):
            raise UsageError(f"calibration.method must be error, minmax or percentile, got {self.method!r}.")
        _at_least(1, calibration_num_images=self.num_images)
        if self.exponent <= 0:
            raise UsageError(f"calibration.exponent must be above 0, got {self.exponent}.")
        if not 0.5 < self.percentile <= 1:
            raise UsageError(
                f"calibration.percentile must be above 0.5 and at most 1, got {self.percentile}."
            )


@dataclass(frozen=True, kw_only=True)
class StatisticalRanges:
    """Activation ranges from BatchNorm statistics alone; no image is looked at.

    Attributes:
        deviations: how far from a channel's mean its range ends, in its deviations.
    """

    deviations: float = 6.0

    def __post_init__(self) -> None:
        if not self.deviations > 0:
            raise UsageError(f"calibration.deviations must be above 0, got {self.deviations}.")


@dataclass(frozen=True, kw_only=True)
class Equalization:
    """Rewrite the weights of the student's copy: equal ranges of channels, no large biases before a ReLU.

    Attributes:
        passes: over all pairs of layers, at most.
        replace_relu6: put ReLU in the place of clipped ones first, whose channels cannot be rescaled; this
            may change what the network computes by much.
        absorb: move biases into the next layer as far as channels exceed them by `absorb_deviations`.
        absorb_deviations: see `absorb`.
    """

    passes: int = 50
    replace_relu6: bool = False
    absorb: bool = True
    absorb_deviations: float = 3.0

    def __post_init__(self) -> None:
        _at_least(1, equalization_passes=self.passes)


@dataclass(frozen=True, kw_only=True)
class NormEqualization:
    """Give the channels that a LayerNorm returns one range, and take that back in the layers after it.

    Attributes:
        num_images: images that ranges are observed on, the first ones of the set.
    """

    num_images: int = 32

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UsageError(f"norm_equalization.num_images must be at least 1, got {self.num_images}.")


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """Take what rounding adds to the mean of a layer's output from its bias, from BatchNorm statistics."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Learn rounding and step sizes, unit by unit, against the teacher's outputs.

    Attributes:
        steps: optimizer steps a unit.
        batch_size: images a step, drawn without replacement within a pass over the images.
        lr_rounding: Adam, rounding logits, constant.
        lr_weight_scale, lr_activation_scale: Adam, step sizes, cosine to 0.
        drop_prob: probability that an element of a quantized activation keeps its float value (QDrop).
        input_mix_prob: probability that an element of the unit's input comes from the teacher.
        rounding_weight: factor of the rounding regulariser (a sum over weights).
        warmup: share of the steps before the regulariser sets in.
        beta_start, beta_end: exponent of the regulariser, linear between the end of the warm-up and the last
            step; at least 1.
        maps: class activation maps at the output of the last unit that has positions, added to its distance.
        at_8_bits: what is done in place of learning where weights have 8 bits and activations 8 or none:
            "correct_biases" by the mean errors of layers on the images, or "nothing".
        precision: of convolutions and matrix products while a unit is learned, and of what they are given;
            everything else, and all that is computed before and afterwards, is in float32.
    """

    steps: int = 20000
    batch_size: int = 32
    lr_rounding: float = 1e-3
    lr_weight_scale: float = 1e-4
    lr_activation_scale: float = 4e-5
    drop_prob: float = 0.5
    input_mix_prob: float = 0.5
    rounding_weight: float = 1.0
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    maps: MapAlignment | None = None
    at_8_bits: Literal["correct_biases", "nothing"] = field(
        default="correct_biases", metadata={"described": "unless default"}
    )
    precision: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"described": "unless default"}
    )

    def __post_init__(self) -> None:
        _at_least(1, reconstruction_steps=self.steps, reconstruction_batch_size=self.batch_size)
        _at_least(1, reconstruction_beta_start=self.beta_start, reconstruction_beta_end=self.beta_end)
        for name in ("drop_prob", "input_mix_prob", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"reconstruction.{name} must be between 0 and 1, got {getattr(self, name)}.")


Source = Synthesis | PixelSynthesis | GeneratorSynthesis | TextToImage | GaussianNoise | GivenImages


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run does to a model, but for the bits.

    Attributes:
        name: as on the command line.
        paper: title and where to find it.
        fold_batch_norm: fold BatchNorm into the layer before it, on the student's copy, where it can be.
        equalization: rewrites of its weights; None leaves them.
        norm_equalization: a rewrite around LayerNorms, from images; None leaves them.
        scheme: bits and their placement; `--bits`, `--ends` and `--placement` replace it.
        bias_correction: of the quantized layers; None leaves their biases.
        synthesis: where the images come from.
        refinement: how synthetic images are moved afterwards; None leaves them. At 8 bits they stay.
        filter: which of the images are kept; None keeps all.
        low_pass: blurs the images before anything is calibrated or learned on them.
        num_holdout: images made besides, used for nothing but the agreement that is reported.
        calibration: activation ranges.
        reconstruction: None to keep rounding to nearest.
        fine_tuning: end to end, after the reconstruction if there is one; None for no fine-tuning.
    """

    name: str
    paper: str
    fold_batch_norm: bool = False
    equalization: Equalization | None = None
    norm_equalization: NormEqualization | None = None
    scheme: Scheme = field(default_factory=Scheme)
    bias_correction: BiasCorrection | None = None
    synthesis: Source = field(default_factory=Synthesis)
    refinement: Refinement | None = None
    filter: Filter | None = None
    low_pass: LowPass | None = None
    num_holdout: int = 32
    calibration: Calibration | StatisticalRanges = field(default_factory=Calibration)
    reconstruction: Reconstruction | None = field(default_factory=Reconstruction)
    fine_tuning: FineTuning | None = None


def _at_least(lowest: int, **values: float) -> None:
    """Check settings given as stage_name=value."""
    for name, value in values.items():
        if value < lowest:
            raise UsageError(f"{name.replace('_', '.', 1)} must be at least {lowest}, got {value}.")
