"""IntraQ: images of classes that differ within a class, then distillation with hard labels.

Paper: Zhong et al., "IntraQ: Learning Synthetic Images with Intra-Class Heterogeneity for Zero-Shot Network
Quantization", CVPR 2022, arXiv:2111.09136. Images: random crops in half of the steps, a soft target for the
probability of the class, and distances to the class mean kept within limits; see `recipes/sources.py` for how
these differ from the code. Fine-tuning as in its code: 20 times the distillation at temperature 20 plus the
cross-entropy of all labels, SGD at 1e-4 with a tenth of it after 20, 40 and 60 of 147 epochs (in the code
151, of which 4 observe ranges).

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
    fine_tuning=FineTuning(
        epochs=147, lr=1e-4, ranges="minmax", labels=ClassLabels(weight=1.0, threshold=1.0)
    ),
)
