"""Budgets: images and steps together, for settings that a user did not give."""

import math
from dataclasses import replace

from zsq.errors import UsageError
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.look_settings import Cosine
from zsq.images.pixel_settings import Centres, PixelSynthesis
from zsq.images.prompts import TextToImage
from zsq.images.settings import Filter, Synthesis
from zsq.recipe import Recipe, Reconstruction
from zsq.recover.settings import FineTuning

BUDGETS = ("quick", "standard", "paper")
LARGE = 64 * 64  # pixels of an input above which a step costs so much more that the counts are smaller
# (budget, large input) -> images, synthesis steps a batch, reconstruction steps a unit
COUNTS = {
    ("quick", False): (128, 150, 200),
    ("standard", False): (256, 300, 400),
    ("quick", True): (32, 100, 50),
    ("standard", True): (64, 100, 100),
}
# The same for a refinement: steps a batch, reconstruction steps a unit of the student it refines against
REFINEMENT_COUNTS = {
    ("quick", False): (15, 40),
    ("standard", False): (30, 80),
    ("quick", True): (5, 10),
    ("standard", True): (10, 20),
}
# The same for fine-tuning: epochs, iterations an epoch, images an iteration
FINE_TUNING_COUNTS = {
    ("quick", False): (5, 20, 64),
    ("standard", False): (10, 40, 64),
    ("quick", True): (2, 10, 16),
    ("standard", True): (5, 20, 16),
}

# A rounding logit has to travel up to 4.8 to change its mind (the rectified sigmoid is 0 at -2.4, 1 at 2.4).
# At the published rate of 1e-3 that takes thousands of steps; fewer steps get a rate with which it still can.
# At 4 and more bits of a weight fewer roundings have to change, and a smaller rate is better.
TRAVEL, TRAVEL_OF_4_BITS = 4.0, 1.6
MAX_LR_ROUNDING = 0.02
# Factor, at most, of the rates of step sizes where activations have 2 bits: there they have far to go.
MAX_SCALES_FACTOR_OF_2_BITS = 30.0
# Published for images of more than 64 x 64 pixels: images an iteration, and the factor of the learning rate.
LARGE_BATCH, LARGE_FACTOR = 16, 0.1
# Of a generator: images that ranges are calibrated on, and factor of the steps on the teacher alone.
LARGE_GENERATED, LARGE_WARM_UP = 320, 12.5
# Factor of the learning rate of so few steps of fine-tuning; ten times the published one diverges.
FINE_TUNING_FACTOR = 3.0
FINE_TUNING_CLIP = 1e-3  # share of the weights' norm that a step at that rate may be
# Largest difficulty of a generator's images with hard labels: in so few steps it has not learned all classes.
GENERATED_DIFFICULTY = 0.5
# Of pixels, in so few steps that the published plateau is not reached, after which the rate falls from 0.5.
PIXEL_LR = 0.1
# Of the class loss of pixels, at most, in so few steps: at a larger one the statistics stay far away.
PIXEL_CLASS_WEIGHT = 0.1
# The same of a generator's images, as a share of the weight of the BatchNorm match; and its rate.
GENERATED_CLASS_SHARE = 0.1
GENERATOR_LR = 3e-3  # not of one that plays against the student
# Images are refined over the same sum of learning rates as in the published steps, up to this factor.
MAX_REFINEMENT_FACTOR = 20.0


def with_budget(recipe: Recipe, budget: str, *, input_size: tuple[int, int, int] | None = None) -> Recipe:
    """The recipe with the counts of a budget; "paper" keeps the published ones, which the recipe holds.

    Fewer steps of reconstruction come with a larger `lr_rounding`. Measured on cifar100_resnet20s, 256
    synthetic images, 400 steps, W2A4, seed 0: top-1 52.7 at 1e-3 (published for 20000 steps), 59.7 at 5e-3,
    60.4 at 1e-2. W4A4, mean of seeds 0-2: cifar10_resnet20 90.6 at 1e-2, 90.9 at 4e-3, cifar100_resnet20s
    66.6 at both. Where activations have 2 bits the rates of step sizes grow too. Measured on
    cifar10_resnet20s (92.9), quick budget, seeds 0 and 1, both rates times 1, 10, 30 and 100: W2A2
    74.2, 76.6, 77.7, 76.9; W2A4 88.9, 88.9, 88.8 (times 30); W3A3 88.8, 88.8, 88.4; W4A4 91.3, 91.6, 91.4.
    The rates of a refinement grow as its steps become fewer, as at the published ones 30 steps
    move the images little: see the measurements in `zsq show sadag`.

    Large inputs get 100 steps of synthesis in the quick budget too: with 50, imagenet_etinynet_1.0 at W8A8
    (72.2 in float, 500 images) had 68.0, 69.0 and 69.0 with seeds 0-2, with 100 70.4, 69.8 and 69.4.

    Pixels have a rate of 0.1 on a cosine (`PixelSynthesis.cosine`) in place of 0.5 until the loss stays where
    it is, which it does not in so few steps: pixels ended at up to five times black and white. Measured
    on cifar10_resnet20s (92.9), 128 images of 150 steps, ranges of minima and maxima, nothing learned, W4A4,
    1500 test images, seed 0: intraq 54.3 before and 83.3 now, hast 65.1 and 79.6, zeroq 86.1 and 85.2; with
    the ranges of the calibration 87.5 and 90.7, 87.7 and 88.8, 88.9 and 88.6.

    The rate of fine-tuning is three times the published one. Measured on cifar10_resnet20, W3A3, 256
    synthetic images, 100 steps on 64 of them, distillation alone, 2000 test images, seed 0: with ranges of
    minima and maxima 62.8 before it, 74.1 at the published rate (1e-5), 77.5 at three times that, 9.8 at ten
    times; with the ranges of the calibration 72.9 before it, 84.9 and 86.0. Losses that add to distillation
    have steeper slopes, hast's for instance, and so have the first steps of every student; one that is
    thrown far stays where all images look alike, with no higher a loss than before. A step is therefore at
    most a thousandth of the weights' norm (`FineTuning.clip`). Measured on cifar10_resnet20s, W3A3, 128
    images, ranges of minima and maxima, 2000 test images, seed 0: intraq 24.6 without and 70.3 with it, hast
    13.4 and 47.8, distillation on real images 81.0 and 80.3. Where the rate is still too high it falls, see
    `FineTuning.undo_rise`.

    Pixels start from noise with the spectrum and the shared colours of photographs (`start`), as so few steps
    leave in them much of what they start from, and stay between black and white (`valid_pixels`), without
    which their ranges of minima and maxima can be worse (cifar10_resnet20, W4A4, hast, weight 1, nothing
    learned: 76.8, with it 86.2, from white noise 86.4). Their class loss has a weight of at most 0.1 (HAST
    10), as it is followed at the cost of the statistics. Measured with distillation alone, 128 images of 150
    steps, ranges of minima and maxima, 2000 test images, seed 0 (1):

        start, highest weight          hast, W3A3 (10s)  hast, W3A3 (10)  hast, W4A4 (100)  intraq (10s)
        white noise, 1                 43.0 (41.5)       66.2             41.5              69.8 (69.2)
        natural, colours apart, 1      52.8 (36.9)       61.7             53.3              74.8 (74.7)
        natural, colours apart, 0.1    63.3 (55.2)       -                56.2              79.7
        natural, 1                     70.7              39.2             -                 80.1
        natural, 0.1                   66.1 (71.5)       -                60.8              77.7
        natural, 0.03                  44.0 (60.0)       -                61.5              -
        natural, valid, 1              -                 77.5             -                 -
        natural, valid, 0.1            77.6 (75.3)       75.3             62.5              -
        real images                    78.8              -                62.6              78.8

    (10s) is cifar10_resnet20s, on which all but the last setting was chosen, (10) cifar10_resnet20, which
    showed the need of it, (100) cifar100_resnet20s.

    A generator's class loss has at most a tenth of the weight of its BatchNorm match (GDFQ ten times as
    much), and its rate is 3e-3 (published 1e-3), unless it plays against the student
    (`Turns.adaptability`). Measured on cifar10_resnet20s, W3A3, quick budget, all test images, seed 0 (1):

        class weight / BatchNorm weight, rate  gdfq   texq   adadfq
        published, 1e-3                        41.7   46.3   30.3 (33.0)
        0.3, 1e-3                              54.6   -      -
        0.1, 1e-3                              51.5   54.2   46.4 (41.8)
        0.1, 3e-3                              58.0   64.5   30.6 (42.9)
        0.1, 1e-2                              48.2   -      -

    Of a generator's images, those have hard labels whose class the teacher finds at least as likely as not
    (SynQ's threshold): in so few steps it does not make each of many classes. cifar100_resnet20s, W4A4,
    gdfq, 2000 test images, seed 0: 33.7 before fine-tuning, 4.8 after it, 38.0 without hard labels; on
    cifar10_resnet20s at W3A3 38.9, and 40.1 with the threshold.

    Args:
        recipe: with the published counts.
        budget: "quick" (minutes on two CPU cores), "standard" or "paper".
        input_size: (C, H, W) of the model; inputs of more than 64 x 64 pixels get smaller counts, as there a
            step costs fifty times that of 32 x 32.

    Raises:
        UsageError: an unknown budget.
    """
    if budget not in BUDGETS:
        raise UsageError(f"The budget must be one of {', '.join(BUDGETS)}, got {budget!r}.")
    large = input_size is not None and input_size[1] * input_size[2] > LARGE
    if budget == "paper":
        return _published_for_large(recipe) if large else recipe
    num_images, synthesis_steps, reconstruction_steps = COUNTS[budget, large]
    source = recipe.synthesis
    if isinstance(source, Synthesis):
        source = replace(source, num_images=num_images, steps=synthesis_steps)
    elif isinstance(source, PixelSynthesis):
        source = _pixels(source, num_images, synthesis_steps, large)
    elif isinstance(source, GeneratorSynthesis):
        turns = None if recipe.fine_tuning is None else recipe.fine_tuning.turns
        rate = source.lr if turns is not None and turns.adaptability is not None else GENERATOR_LR
        batch_size = FINE_TUNING_COUNTS[budget, large][2]
        source = _generator(source, num_images, synthesis_steps, batch_size, rate, large)
    elif isinstance(source, TextToImage):
        kept_of_it = recipe.filter.chain[-1].keep if recipe.filter is not None else source.num_images
        source = replace(source, num_images=round(source.num_images * num_images / kept_of_it))
    else:
        source = replace(source, num_images=num_images)
    reconstruction, bits = recipe.reconstruction, recipe.scheme.weight_bits
    if reconstruction is not None:
        rate = _rounding_rate(reconstruction.lr_rounding, reconstruction_steps, bits)
        reconstruction = _faster_scales(reconstruction, reconstruction_steps, recipe.scheme.activation_bits)
        reconstruction = replace(reconstruction, steps=reconstruction_steps, lr_rounding=rate)
    refinement = recipe.refinement
    if refinement is not None:
        steps, warmup_steps = REFINEMENT_COUNTS[budget, large]
        faster = _faster(refinement.steps, steps, MAX_REFINEMENT_FACTOR)
        refinement = replace(
            refinement,
            steps=steps,
            lr_latent=refinement.lr_latent * faster,
            lr_generator=refinement.lr_generator * faster,
            warmup_steps=warmup_steps,
            warmup_lr_rounding=_rounding_rate(refinement.warmup_lr_rounding, warmup_steps, bits),
        )
    kept = recipe.filter
    if kept is not None:
        kept = _scaled(kept, num_images / kept.chain[-1].keep)
    tuning = _shortened(recipe.fine_tuning, budget, large)
    if isinstance(source, GeneratorSynthesis):
        tuning = _easy_labels(tuning)
    return replace(
        recipe,
        synthesis=source,
        refinement=refinement,
        filter=kept,
        reconstruction=reconstruction,
        fine_tuning=tuning,
    )


def _published_for_large(recipe: Recipe) -> Recipe:
    """The recipe, with what papers have for ImageNet where it holds what they have for CIFAR."""
    if isinstance(recipe.synthesis, GeneratorSynthesis):
        recipe = replace(recipe, synthesis=_for_large(recipe.synthesis))
    if recipe.fine_tuning is not None:
        recipe = replace(recipe, fine_tuning=_shortened(recipe.fine_tuning, "paper", True))
    return recipe


def _scaled(chosen: Filter, factor: float) -> Filter:
    then = None if chosen.then is None else _scaled(chosen.then, factor)
    return replace(chosen, keep=max(1, round(chosen.keep * factor)), then=then)


def _shortened(tuning: FineTuning | None, budget: str, large: bool) -> FineTuning | None:
    """Fine-tuning with the counts of a budget; its rate decays once, for the last fifth."""
    if tuning is None:
        return None
    if large:  # the recipe holds what HAST and SynQ have for CIFAR; this is what they have for ImageNet
        tuning = replace(tuning, batch_size=LARGE_BATCH, lr=_plain(tuning.lr * LARGE_FACTOR))
    if budget == "paper":
        return tuning
    epochs, iterations, batch_size = FINE_TUNING_COUNTS[budget, large]
    return replace(
        tuning,
        epochs=epochs,
        iterations=iterations,
        batch_size=batch_size,
        lr=_plain(tuning.lr * FINE_TUNING_FACTOR),
        clip=FINE_TUNING_CLIP,
        lr_decay_epochs=max(1, epochs * 4 // 5),
        lr_decays=1,
    )


def _easy_labels(tuning: FineTuning | None) -> FineTuning | None:
    """Hard labels only of images that the teacher takes for their class; the generator has learned little."""
    if tuning is None or tuning.labels is None:
        return tuning
    labels = replace(tuning.labels, threshold=min(tuning.labels.threshold, GENERATED_DIFFICULTY))
    return replace(tuning, labels=labels)


def _rounding_rate(published: float, steps: int, bits: int) -> float:
    """Learning rate of rounding logits for so many steps, for weights of so many bits."""
    travel = TRAVEL if bits < 4 else TRAVEL_OF_4_BITS
    return min(max(published, travel / steps), MAX_LR_ROUNDING)


def _faster(published: int, steps: int, most: float) -> float:
    """Factor of a rate for fewer steps: as many times as large as steps are fewer, at most `most`."""
    return max(1.0, min(published / steps, most))


def _faster_scales(published: Reconstruction, steps: int, activation_bits: int | None) -> Reconstruction:
    """At 2 bits, larger learning rates of step sizes for fewer steps."""
    if activation_bits != 2:
        return published
    faster = _faster(published.steps, steps, MAX_SCALES_FACTOR_OF_2_BITS)
    return replace(
        published,
        lr_weight_scale=round(published.lr_weight_scale * faster, 9),
        lr_activation_scale=round(published.lr_activation_scale * faster, 9),
    )


def _pixels(published: PixelSynthesis, num_images: int, steps: int, large: bool) -> PixelSynthesis:
    """At most so many images and steps a batch; the steps of the centres shrink in proportion.

    Large centres are no more than there are images: of 1000 classes they would take 30 times their time.
    """
    steps = min(published.steps, steps)
    num_images = min(published.num_images, num_images)
    centres = _shorter_centres(published.centres, steps / published.steps)
    if centres is not None and large:
        centres = replace(centres, classes=min(num_images, centres.classes or num_images))
    fewer, classes = steps < published.steps, published.classes
    if fewer and published.cosine is None:
        lr = min(published.lr, PIXEL_LR)
        published = replace(published, lr=lr, cosine=Cosine(), start="natural", valid_pixels=True)
    if fewer and classes is not None and published.bn is not None:
        weight = min(classes.weight, PIXEL_CLASS_WEIGHT)
        published = replace(published, classes=replace(classes, weight=weight))
    return replace(published, num_images=num_images, steps=steps, centres=centres)


def _generator(
    published: GeneratorSynthesis, num_images: int, steps: int, batch_size: int, rate: float, large: bool
) -> GeneratorSynthesis:
    """At most so many images, steps and images a step (those of fine-tuning); fewer steps go at `rate`."""
    source = _for_large(published) if large else published
    if steps < source.steps:
        most = GENERATED_CLASS_SHARE * source.bn.weight or math.inf
        source = replace(
            source,
            lr=max(source.lr, rate),
            class_weight=min(source.class_weight, most),
            centres=_shorter_centres(source.centres, steps / source.steps),
            steps=steps,
        )
    return replace(
        source, num_images=min(source.num_images, num_images), batch_size=min(source.batch_size, batch_size)
    )


def _for_large(published: GeneratorSynthesis) -> GeneratorSynthesis:
    """What GDFQ has for ImageNet: another generator, longer trained on the teacher, by smaller batches."""
    return replace(
        published,
        condition="norms",
        batch_size=LARGE_BATCH,
        num_images=min(published.num_images, LARGE_GENERATED),
        steps=round(published.steps * LARGE_WARM_UP),
    )


def _shorter_centres(centres: Centres | None, share: float) -> Centres | None:
    return None if centres is None else replace(centres, steps=max(1, round(centres.steps * share)))


def _plain(number: float) -> float:
    """Without the digits that a product in floating point adds: 3e-05, not 3.0000000000000004e-05."""
    return float(f"{number:.6g}")
