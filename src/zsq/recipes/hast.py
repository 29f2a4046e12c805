"""HAST: a student in uniform low bits, fine-tuned on hard images that are made harder for it.

Paper: Li, Wu, Lv, Liao, Chen, Zhang, Wu, "Hard Sample Matters a Lot in Zero-Shot Quantization", CVPR 2023,
arXiv:2303.13826. Every quantizer has the same bits (protocol of GDFQ); the student is trained end to end
against the teacher's soft labels and channel attentions, on each batch and on the batch after a small step up
the slope of the loss. No hard labels.

Where the paper and its published code differ, or the code is in error, this is what is followed:

* Images are those of Genie; HAST's own are pixels optimised for classes, of which hard ones weigh more.
* Loss, temperature 20, weights 20 and 1000, step 0.01, SGD and its schedule are those of the code for
  CIFAR-10. CIFAR-100 has `fine_tuning.features.weight=2000` and `fine_tuning.perturbation.size=0.02`, ImageNet
  4000 and 0.01. The published schedule for inputs of more than 64 x 64 pixels, a batch of 16 and a tenth of the
  learning rate, is taken for them with `--budget paper`.
* The batch of 256 is the code's 64 on each of 4 processes.
* Of 151 epochs in the code, 4 only observe activation ranges, on images of a generator that is then dropped.
  Ranges here are averages over one pass over the images that are trained on. The code's average multiplies its
  correction into what it stores; here a constant reads as itself from the first batch on.
* Quantizers are where zsq puts them: at the inputs of layers and of identity shortcuts; the code's are after
  every ReLU. Weights have 0 in their range.
* Images are cropped and flipped in every step.
* Channel attentions are those of the last convolution in the body of each block, found in the graph, which is
  the residual body in the code's networks.
"""

from zsq.quant.scheme import Scheme
from zsq.recipe import Recipe
from zsq.recover.settings import FeatureAlignment, FineTuning, Perturbation

HAST = Recipe(
    name="hast",
    paper="Hard Sample Matters a Lot in Zero-Shot Quantization, CVPR 2023, arXiv:2303.13826",
    scheme=Scheme(ends="same"),
    reconstruction=None,
    fine_tuning=FineTuning(epochs=147, features=FeatureAlignment(), perturbation=Perturbation()),
)
