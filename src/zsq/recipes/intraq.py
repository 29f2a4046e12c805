"""IntraQ: images of classes that differ within a class, then distillation with hard labels.

Paper: Zhong et al., "IntraQ: Learning Synthetic Images with Intra-Class Heterogeneity for Zero-Shot Network
Quantization", CVPR 2022, arXiv:2111.09136. Images: random crops in half of the steps, a soft target for the
probability of the class, and distances to the class mean kept within limits; see `recipes/sources.py` for how
these differ from the code. Fine-tuning as in its code: 20 times the distillation at temperature 20 plus the
cross-entropy of all labels, a tenth of the rate after 20, 40 and 60 of 147 epochs (in the code 151, of which
4 observe ranges). The rate is HAST's, 1e-5; the code's 1e-4 diverges here (distillation alone on 64 images a
step, cifar10_resnet20, W3A3: 9.8 % after 100 steps).

Ranges, quantizers, gradients and augmentation: see `zsq show hast`.
"""

from dataclasses import replace

from zsq.recipes.hast import HAST
from zsq.recipes.sources import INTRAQ_IMAGES
from zsq.recover.settings import ClassLabels, FineTuning

INTRAQ = replace(
    HAST,
    name="intraq",
    paper="IntraQ: Learning Synthetic Images with Intra-Class Heterogeneity, CVPR 2022, arXiv:2111.09136",
    synthesis=INTRAQ_IMAGES,
    fine_tuning=FineTuning(epochs=147, ranges="minmax", labels=ClassLabels(weight=1.0, threshold=1.0)),
)
