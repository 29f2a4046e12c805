"""DFQ: no images; weights equalised, biases absorbed and corrected, ranges from BatchNorm statistics.

Paper: Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019, arXiv:1906.04721.

Where this differs from the paper:

* Weights have a range per output channel (the paper: per tensor), that of least 2.4-norm error, as in all
  recipes here. Equalisation matters less then.
* ReLU6 stays, so that layers before it are not equalised; the paper puts ReLU in its place
  (`equalization.replace_relu6=true`). That alone takes imagenet_mobilenetv1_0.75 from 74.6 to 48.4, in float
  on 512 images.
* Biases are not absorbed by layers that pad: at the border a padded zero has nothing to make up for.
* Sums of tensors (residual blocks) have the sum of means and of variances; ranges of what follows them end at
  n deviations too. The mean after maximum pooling is taken to be that before it.

Top-1: cifar10_resnet20 (91.54 in float), 4905 test images, W8A8 91.6, W4A4 85.8. cifar100_resnet20s (70.9 on
the first 1024 test images), W4: 69.8; without bias correction 68.2, without equalisation either 68.7.
imagenet_mobilenetv1_0.75, W8A8: 76.0 on 192 images, as in float.

The Gaussian noise of the recipe serves to report an agreement and to check exported files; nothing is
computed from it.
"""

from zsq.quant.scheme import Scheme
from zsq.recipe import BiasCorrection, Equalization, GaussianNoise, Recipe, StatisticalRanges

DFQ = Recipe(
    name="dfq",
    paper="Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, "
    "arXiv:1906.04721",
    fold_batch_norm=True,
    equalization=Equalization(),
    scheme=Scheme(weight_bits=8, activation_bits=8, ends="same"),
    bias_correction=BiasCorrection(),
    synthesis=GaussianNoise(num_images=64),
    num_holdout=0,
    calibration=StatisticalRanges(),
    reconstruction=None,
)
