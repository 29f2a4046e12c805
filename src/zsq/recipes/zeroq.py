"""ZeroQ and DSG: images optimised as pixels; they set activation ranges and nothing is learned, or little.

Papers: Cai, Yao, Dong, Gholami, Mahoney, Keutzer, "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR
2020, arXiv:2001.00281; Zhang et al., "Diversifying Sample Generation for Accurate Data-Free Quantization",
CVPR 2021, arXiv:2103.01049. How their images are made is in `recipes/sources.py`.

Where this differs from the papers:

* Weight ranges are those of least 2.4-norm error per channel, as in all recipes here; ZeroQ's are min-max.
* Activation ranges are min-max over the images, as in ZeroQ, with a zero point.
* All layers have the same bits (`--ends same`); there is no allocation of bits to layers.

`zeroq-ft` is what later papers compare with under the name of ZeroQ (IntraQ, arXiv:2111.09136, says so): its
images, of which there are then 5120 in batches of 256, and distillation from the teacher as for `intraq`,
without hard labels, as these images were made for no class.

Top-1 of `zeroq` on cifar10_resnet20 (91.54 in float), 4905 test images, standard budget in bfloat16, seed 0:
91.3 at W8A8, 87.1 at W4A4, 88.7 at W4A4 with 8-bit ends.
"""

from dataclasses import replace

from zsq.quant.scheme import Scheme
from zsq.recipe import Calibration, Recipe
from zsq.recipes.hast import HAST
from zsq.recipes.sources import DSG_IMAGES, ZEROQ_IMAGES
from zsq.recover.settings import FineTuning

ZEROQ = Recipe(
    name="zeroq",
    paper="ZeroQ: A Novel Zero Shot Quantization Framework, CVPR 2020, arXiv:2001.00281",
    scheme=Scheme(weight_bits=8, activation_bits=8, ends="same"),
    synthesis=ZEROQ_IMAGES,
    calibration=Calibration(method="minmax"),
    reconstruction=None,
)
ZEROQ_FT = replace(
    HAST,
    name="zeroq-ft",
    paper="images of ZeroQ, CVPR 2020, arXiv:2001.00281, then distillation end to end",
    synthesis=replace(ZEROQ_IMAGES, num_images=5120, batch_size=256),
    fine_tuning=FineTuning(epochs=147, ranges="minmax"),
)
DSG = replace(
    ZEROQ,
    name="dsg",
    paper="Diversifying Sample Generation for Accurate Data-Free Quantization, CVPR 2021, arXiv:2103.01049",
    synthesis=DSG_IMAGES,
)
