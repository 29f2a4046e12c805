"""Images of short budgets: what a source does in fewer steps than were published, and on large inputs."""

import math
from dataclasses import replace

from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.look_settings import Cosine
from zsq.images.pixel_settings import Centres, PixelSynthesis

LARGE_BATCH = 16  # published for images of more than 64 x 64 pixels: images a step
# Of a generator: images that ranges are calibrated on, and factor of the steps on the teacher alone.
LARGE_GENERATED, LARGE_WARM_UP = 320, 12.5
# Of pixels, in so few steps that the published plateau is not reached, after which the rate falls from 0.5.
PIXEL_LR = 0.1
# Of the class loss of pixels, at most, in so few steps: at a larger one the statistics stay far away.
PIXEL_CLASS_WEIGHT = 0.1
# The same of a generator's images, as a share of the weight of the BatchNorm match; and its rate.
GENERATED_CLASS_SHARE = 0.1
GENERATOR_LR = 3e-3  # not of one that plays against the student


def short_pixels(published: PixelSynthesis, num_images: int, steps: int, large: bool) -> PixelSynthesis:
    """At most so many images and steps a batch; the steps of the centres shrink in proportion.

    Large centres are no more than there are images: of 1000 classes they would take 30 times their time.

    Pixels have a rate of 0.1 on a cosine (`PixelSynthesis.cosine`) in place of 0.5 until the loss stays where
    it is, which it does not in so few steps: pixels ended at up to five times black and white. Measured
    on cifar10_resnet20s (92.9), 128 images of 150 steps, ranges of minima and maxima, nothing learned, W4A4,
    1500 test images, seed 0: intraq 54.3 before and 83.3 now, hast 65.1 and 79.6, zeroq 86.1 and 85.2; with
    the ranges of the calibration 87.5 and 90.7, 87.7 and 88.8, 88.9 and 88.6.

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


def short_generator(
    published: GeneratorSynthesis, num_images: int, steps: int, batch_size: int, rate: float, large: bool
) -> GeneratorSynthesis:
    """At most so many images, steps and images a step (those of fine-tuning); fewer steps go at `rate`.

    A generator's class loss has at most a tenth of the weight of its BatchNorm match (GDFQ ten times as
    much), and its rate is 3e-3 (published 1e-3), unless it plays against the student
    (`Turns.adaptability`). Measured on cifar10_resnet20s, W3A3, quick budget, all test images, seed 0 (1):

        class weight / BatchNorm weight, rate  gdfq   texq   adadfq
        published, 1e-3                        41.7   46.3   30.3 (33.0)
        0.3, 1e-3                              54.6   -      -
        0.1, 1e-3                              51.5   54.2   46.4 (41.8)
        0.1, 3e-3                              58.0   64.5   30.6 (42.9)
        0.1, 1e-2                              48.2   -      -
    """
    source = large_generator(published) if large else published
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


def large_generator(published: GeneratorSynthesis) -> GeneratorSynthesis:
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
