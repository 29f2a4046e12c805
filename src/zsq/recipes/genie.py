"""Genie: images from latents and a small generator; block reconstruction with learned rounding and scales.

Paper: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", CVPR 2023, arXiv:2212.04780.

Where the paper and its published code differ, or the code is in error, this is what is followed:

* Learning rates: the code names them the other way round; what it does (latents 0.1, generator 0.01) is
  followed.
* BatchNorm distance: mean over a layer's channels and unbiased deviations with eps 1e-6, as the code; the
  paper's formula is the plain sum.
* Where one layer's stored variance is more than 300 times that of the middle one, every layer's distance is
  divided by its own (`synthesis.bn_units`). The published sum sees that layer alone: a network that takes
  pixels as 0..255 and normalises what its first convolution makes of them has 9100 times there.
  imagenet_etinynet_1.0, quick budget, seed 0, 500 images: W4A8 51.8 as published and 62.6 in units of each
  layer, W4A4 2.2 and 11.6 (19.0 with as many real images); standard budget in `benchmarks/results/units.md`.
  Networks without such a layer are not touched; cifar10_resnet20s would gain 0.4 and 0.3 at W3A3, -0.2 and
  0.3 at W2A4 (seeds 0, 1).
* Normalised images are expected to have mean 0 and deviation 1 only if the model's `mean` and `std` are
  plausible as statistics of data; else they get those of natural photographs (`images/prior.py`). Without
  this, a model that takes pixels as 0..255 is shown images of a hundredth of their contrast
  (cifar10_resnet8k, W8A8, quick budget, seed 0: 80.9 instead of 87.1).
* Images are those of the final latents and generator; the code keeps those of one step before.
* The last, smaller batch of images is kept; the code drops it.
* Minibatches of reconstruction have `batch_size` images; the code's have N / 32, which agrees at N = 1024
  only.
* Units come from the graph. The first layer's unit ends after its BatchNorm and ReLU; the code's ends before
  them.
* Rounding bases are not clipped and the regulariser is a sum with weight 1, as the code.
* Activations that take negative values get a zero point (`calibration.symmetric=false`); the code's ranges
  are symmetric. Rounding to nearest, W3A3, ranges from 128 real images, 2000 dev images:
  cifar100_resnet20s 34.9 against 27.8, cifar10_wrn16_1 80.0 against 79.8. The search uses the limits of the
  quantizer; that of the code is half a step off.
* First ranges come from 128 images; the code's from 32, too few for the last layer (cifar100_resnet14s, W8A8,
  rounding to nearest on 128 synthetic images: 68.1 instead of 67.7).
* At W8A8 and W8 nothing is learned: rounding to nearest loses next to nothing, and learning on few images is
  not better (cifar100_resnet14s, quick budget: 67.7 learned, 68.1 to nearest, 68.3 in float). Biases take up
  the mean errors of layers on the images instead (`reconstruction.at_8_bits`): imagenet_etinynet_1.0, quick
  budget, seed 0, 500 real images: divergence of the class probabilities from the teacher's 0.117 before and
  0.074 after, same class as the teacher 86.6 % and 90.4 %, top-1 70.4 and 71.4 (72.2 in float).
* Step sizes are kept positive; the code does not.
* A unit whose learned rounding is worse than rounding to nearest on its own images keeps the latter.
* Schedules: the waiting times of the learning rates of images stay as published when there are fewer steps;
  letting them shrink in proportion (`synthesis.schedule_steps=4000`) gave a higher BatchNorm loss at 200 and
  500 steps.
"""

from zsq.images.settings import Synthesis
from zsq.recipe import Recipe, Reconstruction

GENIE = Recipe(
    name="genie",
    paper="Genie: Show Me the Data for Quantization, CVPR 2023, arXiv:2212.04780",
    synthesis=Synthesis(),
    reconstruction=Reconstruction(),
)
