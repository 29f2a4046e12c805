"""A recipe: one frozen dataclass for every stage, in pipeline order. A paper's method is a composition."""

import types
import typing
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from zsq.errors import UsageError
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import PixelSynthesis
from zsq.images.prompts import TextToImage
from zsq.images.settings import Filter, LowPass, Refinement, Synthesis
from zsq.quant.scheme import Scheme
from zsq.recover.settings import FineTuning, MapAlignment

T = TypeVar("T")


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


def with_overrides(recipe: Recipe, overrides: typing.Mapping[str, str | int | float | bool | None]) -> Recipe:
    """Replace fields by dotted name, e.g. {"synthesis.steps": 500}; texts are read as the field's type.

    A stage that the recipe does not use is put in with its defaults by "on", e.g. {"filter": "on"}; "none"
    takes an optional stage out.

    Raises:
        UsageError: an unknown field, or a value that the field cannot take.
    """
    for name, value in overrides.items():
        recipe = _replace(recipe, name.split("."), value, name)
    return recipe


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries that JSON can hold; a stage's kind is under "kind".

    Optional stages that a recipe does not have (refinement, filter, fine_tuning ...) are left out, and so are
    settings that came later and have their default: what was run before them keeps its description.
    """

    def left_out(f: Any, value: Any) -> bool:
        return (f.default is None or "described" in f.metadata) and value == f.default

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            body = {
                f.name: plain(getattr(value, f.name))
                for f in fields(value)
                if not left_out(f, getattr(value, f.name))
            }
            return body if isinstance(value, Recipe) else {"kind": type(value).__name__, **body}
        return value

    result: dict[str, Any] = plain(recipe)
    return result


def flat(recipe: Recipe) -> dict[str, Any]:
    """All settings by the dotted name that `--set` takes; a stage without settings of its own is "on"."""
    found: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        for f in fields(value):
            inner = getattr(value, f.name)
            if is_dataclass(inner) and fields(inner):
                walk(inner, f"{prefix}{f.name}.")
            else:
                found[prefix + f.name] = "on" if is_dataclass(inner) else inner

    walk(recipe, "")
    return found


def _replace(target: T, path: list[str], value: Any, name: str) -> T:
    known = {f.name: f for f in fields(target)}  # type: ignore[arg-type]
    head, *rest = path
    hint = typing.get_type_hints(type(target)).get(head)
    whole = head in known and not rest and is_dataclass(getattr(target, head))
    switched = type(None) in typing.get_args(hint) and value in (None, "none", "on")
    if head not in known or (whole and not switched):
        raise UsageError(
            f"There is no setting {name!r}; at this place there are: {', '.join(sorted(known))}. "
            "`zsq show RECIPE` lists all of them."
        )
    current = getattr(target, head)
    if rest:
        if current is None:
            raise UsageError(f"Setting {name!r} is inside {head!r}, which this recipe does not use.")
        if not is_dataclass(current):
            raise UsageError(f"There is no setting {name!r}: {head!r} is a single value, {current!r}.")
        new: Any = _replace(current, rest, value, name)
    elif whole and value == "on":
        return target  # it is
    else:
        new = _convert(value, hint, name)
    return replace(target, **{head: new})  # type: ignore[type-var]


def _convert(value: Any, hint: Any, name: str) -> Any:
    options = (
        typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
    )
    if typing.get_origin(hint) is typing.Literal:
        if value in options:
            return value
        raise UsageError(f"Setting {name!r} is one of {', '.join(map(repr, options))}, got {value!r}.")
    for option in options:
        if option is type(None) and (value is None or value == "none"):
            return None
        if is_dataclass(option) and value == "on":
            stage: Any = option
            return stage()
        if option is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if option is str and isinstance(value, str):
            return value
        if option in (int, float) and not isinstance(value, bool):
            try:
                number = option(value)
            except (TypeError, ValueError, OverflowError):
                continue
            if option is float or isinstance(value, (int, str)) or number == value:
                return _in_range(number, name)
    kinds = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise UsageError(f"Setting {name!r} needs a value of type {kinds}, got {value!r}.")


def _in_range(number: float, name: str) -> float:
    if number != number or number in (float("inf"), float("-inf")) or number < 0:
        raise UsageError(f"Setting {name!r} must be a finite number that is not negative, got {number}.")
    return number


def _at_least(lowest: int, **values: float) -> None:
    """Check settings given as stage_name=value."""
    for name, value in values.items():
        if value < lowest:
            raise UsageError(f"{name.replace('_', '.', 1)} must be at least {lowest}, got {value}.")
