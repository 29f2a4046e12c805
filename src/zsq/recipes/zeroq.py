"""ZeroQ and DSG: images optimised as pixels; they set activation ranges and nothing is learned.

Papers: Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR
2020, arXiv:2001.00281; Zhang et al., "Diversifying Sample Generation for Accurate Data-Free Quantization",
CVPR 2021, arXiv:2103.01049. How their images are made is in `recipes/sources.py`.

Where this differs from the papers:

* Weight ranges are those of least 2.4-norm error per channel, as in all recipes here; ZeroQ's are min-max.
* Activation ranges are min-max over the images, as in ZeroQ, with a zero point.
* All layers have the same bits (`--ends same`); there is no allocation of bits to layers.

Top-1 of `zeroq` on cifar10_resnet20 (91.54 in float), 4905 test images, standard budget in bfloat16, seed 0:
91.3 at W8A8, 87.1 at W4A4, 88.7 at W4A4 with 8-bit ends.
"""

from dataclasses import replace

from zsq.quant.scheme import Scheme
from zsq.recipe import Calibration, Recipe
from zsq.recipes.sources import DSG_IMAGES, ZEROQ_IMAGES

ZEROQ = Recipe(
    name="zeroq",
    paper="ZeroQ: A Novel Zero Shot Quantization Framework, CVPR 2020, arXiv:2001.00281",
    scheme=Scheme(weight_bits=8, activation_bits=8, ends="same"),
    synthesis=ZEROQ_IMAGES,
    calibration=Calibration(method="minmax"),
    reconstruction=None,
)
DSG = replace(
    ZEROQ,
    name="dsg",
    paper="Diversifying Sample Generation for Accurate Data-Free Quantization, CVPR 2021, arXiv:2103.01049",
    synthesis=DSG_IMAGES,
)
