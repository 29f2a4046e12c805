"""Images optimised as pixels or made by a generator, as papers have them: parts of recipes.

Where a paper has other settings for images of 224 pixels than for those of 32, the latter have the plain
name and the former end in `_LARGE`. All are 1000 steps of Adam at 0.5 (ZeroQ, DSG: 500), which falls to a
tenth when the loss has not fallen for 50 (100) steps.

Common to all pixels, and other than in the published codes:

* Labels are balanced: every class equally often in the set and in every batch; the codes draw them.
* Statistics of BatchNorm's inputs come from the layer before, where a BatchNorm is folded into it, and are
  brought back to the units of the input: the same numbers up to rounding.
* Normalised images start with the mean and deviation that `images/prior.py` expects, as for `genie`.
* Crops have real-valued boxes (the codes' have whole pixels).
* Budgets with fewer steps have a rate of 0.1 on a cosine, a class loss of weight 0.1 at most, a start from
  noise with the spectrum of photographs (`PixelSynthesis.start`), pixels between black and white, and for
  large inputs no more centres than images, see `zsq.image_budget`.
"""

from dataclasses import replace

from zsq.images.class_settings import ClassGuide
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import Centres, Crops, PixelSynthesis, StatisticsMatch

# ZeroQ (arXiv:2001.00281): no classes. Its code takes the statistics of each image on its own, where the
# paper writes those of a batch, and squared norms over channels; it adds 1e-6 to the variances on both
# sides.
ZEROQ_MATCH = StatisticsMatch(over="image", channels="sum")
ZEROQ_IMAGES = PixelSynthesis(
    num_images=64,
    batch_size=64,
    steps=500,
    plateau_patience=100,
    image_weight=1.0,
    bn=ZEROQ_MATCH,
)

# DSG (arXiv:2103.01049): ZeroQ's images with slack distribution alignment and layer-wise sample
# enhancement. The paper's batch has an image for each BatchNorm layer; here image i enhances layer i mod L
# in any batch.
DSG_IMAGES = replace(ZEROQ_IMAGES, bn=replace(ZEROQ_MATCH, slack=0.9, enhance=True))

# What IntraQ, HAST and SynQ have in common: means and biased variances of a batch, means over channels and
# layers.
BATCH_VARIANCE = StatisticsMatch(spread="variance", layers="mean")

# IntraQ (arXiv:2111.09136), its three parts with the settings of its code for CIFAR-10. For CIFAR-100 the
# code has soft_lowest 0.6, distance_min 0.02 and distance_max 1. The class means of the distance constraint
# are those of the batch at hand (`class_distance_loss`); the code's are those of earlier batches, with none
# in the first. The slope of its loss vanishes where the probability does, so some images never get their
# class: 8 of 64 after 250 steps on cifar10_resnet20 (none with HAST's loss).
INTRAQ_IMAGES = PixelSynthesis(
    bn=BATCH_VARIANCE,
    classes=ClassGuide(
        loss="probability",
        soft_lowest=0.95,
        distance_weight=1.0,
        distance_min=0.05,
        distance_max=0.8,
    ),
    crops=Crops(prob=0.5, smallest=0.5),
)
# For ImageNet the released script leaves only the crops: every target is 1 and no distance costs anything.
INTRAQ_IMAGES_LARGE = replace(INTRAQ_IMAGES, classes=ClassGuide(loss="probability"))

# HAST (arXiv:2303.13826): hard samples; crops only for ImageNet.
HAST_IMAGES = PixelSynthesis(bn=BATCH_VARIANCE, classes=ClassGuide(weight=10.0, hardness=2.0))
HAST_IMAGES_LARGE = replace(
    HAST_IMAGES,
    classes=ClassGuide(weight=0.1, hardness=0.5),
    crops=Crops(prob=0.5, smallest=0.4),
)

# TexQ (NeurIPS 2023) in the form that SynQ's code gives it (arXiv:2603.18423): no texture filters and no
# generator, but the layered targets from one calibration image a class, on top of HAST's images. The code
# divides the distance to the centres by the batch size besides (256), which leaves nothing of it; here it
# is not divided.
TEXQ_IMAGES = replace(HAST_IMAGES, bn=replace(BATCH_VARIANCE, weight=0.4), centres=Centres())
TEXQ_IMAGES_LARGE = replace(HAST_IMAGES_LARGE, bn=replace(BATCH_VARIANCE, weight=0.4), centres=Centres())

# GDFQ (arXiv:2003.03603): its BatchNorm distance is that of IntraQ, a tenth of it counts. Labels are drawn,
# as in the code.
GDFQ_GENERATOR = GeneratorSynthesis(bn=replace(BATCH_VARIANCE, weight=0.1))
# AdaDFQ (arXiv:2303.06869), and AdaSG: all of it counts, and batches are small.
ADADFQ_GENERATOR = replace(GDFQ_GENERATOR, batch_size=16, bn=BATCH_VARIANCE)
# TexQ (NeurIPS 2023): GDFQ's, with one calibration image a class that has the textures of photographs.
TEXQ_GENERATOR = replace(GDFQ_GENERATOR, batch_size=128, centres=Centres(texture_weight=1.0))
