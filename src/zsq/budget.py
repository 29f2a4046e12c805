"""Budgets: images and steps together, for settings that a user did not give."""

from dataclasses import replace

from zsq.errors import UsageError
from zsq.image_budget import GENERATOR_LR, LARGE_BATCH, large_generator, short_generator, short_pixels
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import PixelSynthesis
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
LARGE_FACTOR = 0.1  # published for images of more than 64 x 64 pixels, of the learning rate of fine-tuning
# Factor of the learning rate of so few steps of fine-tuning; ten times the published one diverges.
FINE_TUNING_FACTOR = 3.0
FINE_TUNING_CLIP = 1e-3  # share of the weights' norm that a step at that rate may be
# Largest difficulty of a generator's images with hard labels: in so few steps it has not learned all classes.
GENERATED_DIFFICULTY = 0.5
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

    What becomes of pixels and of generators, and why, is in `zsq.image_budget`.

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
        source = short_pixels(source, num_images, synthesis_steps, large)
    elif isinstance(source, GeneratorSynthesis):
        turns = None if recipe.fine_tuning is None else recipe.fine_tuning.turns
        rate = source.lr if turns is not None and turns.adaptability is not None else GENERATOR_LR
        batch_size = FINE_TUNING_COUNTS[budget, large][2]
        source = short_generator(source, num_images, synthesis_steps, batch_size, rate, large)
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
        recipe = replace(recipe, synthesis=large_generator(recipe.synthesis))
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


def _plain(number: float) -> float:
    """Without the digits that a product in floating point adds: 3e-05, not 3.0000000000000004e-05."""
    return float(f"{number:.6g}")
