"""Settings of image synthesis."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from zsq.errors import UsageError
from zsq.images.class_settings import ClassGuide
from zsq.images.look_settings import Variety
from zsq.images.setting_checks import Units, at_least, check_units, one_of, plateau_factor


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """Images from a small generator whose inputs are trained with it, one generator a batch.

    Attributes:
        num_images: how many.
        batch_size: images that are optimised together; their joint statistics are matched.
        steps: optimizer steps a batch.
        latent_size: length of a latent vector.
        lr_latent: Adam, latents, at the start.
        lr_generator: Adam, generator, at the start.
        generator_decay: factor of `lr_generator`, applied every `generator_decay_interval` steps.
        generator_decay_interval: see `generator_decay`.
        plateau_factor: factor of `lr_latent` when the loss has not fallen for `plateau_patience` steps.
        plateau_patience: see `plateau_factor`.
        lr_latent_min: `lr_latent` never falls below it.
        schedule_steps: number of steps that the patience and the interval above are meant for; they shrink
            in proportion when `steps` is smaller. 0 takes them as they are, which is better in short runs:
            the BatchNorm loss on a CIFAR-10 ResNet-20 is 0.20 after 500 steps and 0.35 after 200, against
            0.31 and 0.50 with 4000.
        swing: shift the input of every strided convolution by up to one pixel, at random, in every step.
        bn_weight: factor of the distance to the BatchNorm statistics.
        bn_units: of that distance: "activations" (published), "deviations" of the layer, or "auto", see
            `Units`.
        image_weight: factor of the distance of each image to mean 0 and deviation 1, or to its `variety`.
        cooldown: share of the steps, the last ones, over which both learning rates fall linearly to 0.
        converged: a batch ends early when the mean loss of its last 50 steps is not lower by this share than
            that of the 50 before; 0 never ends it early.
        reuse_steps: steps of every batch but the first, which then starts from the generator that the first
            one trained (its latents are its own); 0 gives each batch a fresh generator and `steps` steps.
        precision: of convolutions and matrix products; statistics, images and parameters are always float32.
        classes: what is asked of an image's class; None, as published: images have no class.
        variety: how images differ from one another in brightness and contrast; None, as published: not.
    """

    num_images: int = 1024
    batch_size: int = 128
    steps: int = 4000
    latent_size: int = 256
    lr_latent: float = 0.1
    lr_generator: float = 0.01
    generator_decay: float = 0.95
    generator_decay_interval: int = 100
    plateau_factor: float = 0.1
    plateau_patience: int = 100
    lr_latent_min: float = 1e-4
    schedule_steps: int = 0
    swing: bool = True
    bn_weight: float = 1.0
    image_weight: float = 1.0
    cooldown: float = 0.0
    converged: float = 0.0
    reuse_steps: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    classes: ClassGuide | None = None
    variety: Variety | None = None
    bn_units: Units = field(default="auto", metadata={"described": "unless default"})

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 2:
                raise UsageError(
                    f"synthesis.{name} is {getattr(self, name)}. Expected at least 2: the joint "
                    "statistics of the images of a batch are what is optimised."
                )
        at_least(1, "synthesis", self, ("steps", "latent_size", "generator_decay_interval"))
        if not 0 <= self.cooldown <= 1:
            raise UsageError(f"synthesis.cooldown is {self.cooldown}. Expected a share of the steps, 0 to 1.")
        if self.converged >= 1 or self.reuse_steps < 0:
            raise UsageError(
                f"synthesis.converged is {self.converged} and synthesis.reuse_steps {self.reuse_steps}. "
                "Expected a share below 1 and a number of steps."
            )
        plateau_factor("synthesis", self.plateau_factor)
        check_units("synthesis.bn_units", self.bn_units)
        one_of("synthesis.precision", self.precision, ("float32", "bfloat16"))


Scope = Literal["last_layer", "last_unit", "all_units"]


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Move synthetic images until the student's gradients change little between each and its neighbours.

    Latents and generators that synthesis has trained are trained further, batch by batch, against a student
    that a short reconstruction on the images has made and that is thrown away afterwards.

    Attributes:
        warmup_steps: reconstruction steps a unit of that student, with the recipe's other settings.
        warmup_lr_rounding: Adam, rounding logits of that student.
        steps: optimizer steps a batch.
        lr_latent: Adam, latents, at the start.
        lr_generator: Adam, generator, at the start.
        generator_decay: factor of `lr_generator`, applied every `generator_decay_interval` steps.
        generator_decay_interval: see `generator_decay`.
        plateau_factor: factor of `lr_latent` when the loss has not fallen for `plateau_patience` steps.
        plateau_patience: see `plateau_factor`.
        lr_latent_min: `lr_latent` never falls below it, unless it starts there.
        bn_weight: factor of the loss of synthesis (BatchNorm and image statistics, weighed as there).
        bn_relative: whether that loss is divided by what it is of the batch before it is refined. Published:
            no, and what it weighs against the other two depends on how many layers there are, and on how well
            the images have met their statistics.
        bn_hold: whether the weight of that loss grows while it is above what it was before the refinement,
            and shrinks to `bn_weight` again while it is below, see `zsq.images.refine_batch.held`.
        swing: whether strided convolutions read shifted inputs in the loss of synthesis, as in synthesis.
            Published: no, and the teacher's pass is shared with the gradient match.
        match_weight: factor of the gradient match between images and their neighbours.
        match_focus: images whose neighbours are less like them weigh more in it, see `gradient_match`.
            Published: 0, all weigh the same.
        diversity_weight: factor of the largest similarity of each image's gradient to that of another image.
        diversity_threshold: similarities up to it cost nothing.
        radius: Euclidean distance of the neighbour in the space of latents; 0 leaves the gradient match out.
        neighbour: how the least similar neighbour is looked for: "searched" steps from a random start;
            "published" follows the gradient at distance 0, which is rounding noise; "carried" keeps an offset
            a latent over all steps and, after each, takes it to the edge of the ball along the slope that the
            loss of that step had there, which costs no pass of its own (after arXiv:1904.12843).
        neighbour_steps: steps of "searched", each to the edge of the ball.
        gradients: of which weights the gradients are: those of the last layer (nearly free), of the last
            unit, or of every unit (cosines are averaged).
        bank_size: gradients of finished images that are remembered for the diversity, the latest ones.
        rounds: into how many parts the steps of a batch are divided. Before each of them a student is learned
            on the images as they are by then; learning rates, decays and the bank start anew. Published: 1.
    """

    warmup_steps: int = 4000
    warmup_lr_rounding: float = 1e-3
    steps: int = 500
    lr_latent: float = 1e-5
    lr_generator: float = 1e-4
    generator_decay: float = 0.95
    generator_decay_interval: int = 100
    plateau_factor: float = 0.1
    plateau_patience: int = 100
    lr_latent_min: float = 1e-6
    bn_weight: float = 1.0
    bn_relative: bool = field(default=False, metadata={"described": "unless default"})
    bn_hold: bool = field(default=False, metadata={"described": "unless default"})
    swing: bool = field(default=False, metadata={"described": "unless default"})
    match_weight: float = 1.0
    match_focus: float = field(default=0.0, metadata={"described": "unless default"})
    diversity_weight: float = 1.0
    diversity_threshold: float = 0.0
    radius: float = 1.0
    neighbour: Literal["searched", "carried", "published"] = "searched"
    neighbour_steps: int = 1
    gradients: Scope = "last_layer"
    bank_size: int = 1024
    rounds: int = field(default=1, metadata={"described": "unless default"})

    def __post_init__(self) -> None:
        counts = ("warmup_steps", "steps", "generator_decay_interval", "neighbour_steps", "rounds")
        at_least(1, "refinement", self, counts)
        if self.rounds > self.steps:
            raise UsageError(
                f"refinement.rounds is {self.rounds} and refinement.steps {self.steps}. Expected no more "
                "rounds than steps, which they share."
            )
        weights = ("bn_weight", "match_weight", "match_focus", "diversity_weight", "radius", "bank_size")
        at_least(0, "refinement", self, weights)
        plateau_factor("refinement", self.plateau_factor)
        one_of("refinement.neighbour", self.neighbour, ("searched", "carried", "published"))
        one_of("refinement.gradients", self.gradients, get_args(Scope))


FilterMethod = Literal["gradient_cover", "energy", "bn_sensitivity", "patch_entropy", "random"]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Keep some of the images.

    Attributes:
        method: "gradient_cover": greedily the image that most raises the sum over all images of the largest
            cosine between its gradient and that of a chosen one; "energy": those that the classifier knows
            best; "bn_sensitivity": leave out what takes the set away from the BatchNorm statistics;
            "patch_entropy": those whose patches differ most (networks with LayerNorm); "random": any.
        keep: how many; all if there are fewer.
        gradients: of which weights "gradient_cover" takes them, see `Refinement`; the student only has its
            ranges calibrated.
        balanced: "energy", "bn_sensitivity" and "patch_entropy" keep the same share of every class, where it
            is known for which class an image was made, or of which class a given one is.
        then: another filter for what this one keeps.
    """

    method: FilterMethod = "gradient_cover"
    keep: int = 256
    gradients: Scope = "last_layer"
    balanced: bool = True
    then: "Filter | None" = None

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UsageError(f"filter.keep is {self.keep}. Expected at least 1.")
        one_of("filter.method", self.method, get_args(FilterMethod))
        one_of("filter.gradients", self.gradients, get_args(Scope))

    @property
    def chain(self) -> "tuple[Filter, ...]":
        """This filter and those after it, in order."""
        return (self, *(self.then.chain if self.then is not None else ()))


@dataclass(frozen=True, kw_only=True)
class LowPass:
    """Gaussian low-pass filter in the frequency domain (SynQ).

    Attributes:
        cutoff: frequency at which the gain has fallen to exp(-1/2). SynQ's code: 80 bins of images of 224
            pixels; searched 20 to 100. Its pictures of 32 pixels were made with 8 bins, 0.25.
        unit: of it. "size": share of the number of pixels along each axis, where 0.5 is the highest frequency
            there is; the same blur in pixels at any size. "bins": periods an image, as published; the same
            number blurs small images less.
    """

    cutoff: float = 0.357
    unit: Literal["size", "bins"] = "size"

    def __post_init__(self) -> None:
        if not self.cutoff > 0:
            raise UsageError(f"low_pass.cutoff is {self.cutoff}. Expected above 0.")
        if self.unit not in ("size", "bins"):
            raise UsageError(f"low_pass.unit is {self.unit!r}. Expected size or bins.")
