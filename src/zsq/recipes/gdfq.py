"""GDFQ: a generator of images of classes, trained in turns with the student.

Paper: Xu et al., "Generative Low-bitwidth Data Free Quantization", ECCV 2020, arXiv:2003.03603. The
generator is told the class of every image; it learns to make images that the teacher takes for that class
(cross-entropy) and that give its BatchNorm statistics (0.1 times their distance), first on its own, then a
step before each step of the student, whose images those of the generator's step are. The student learns from
hard labels and, at temperature 20, soft ones, with the running statistics of its BatchNorm layers fixed.

Without turns (`fine_tuning.turns=none`) the student learns on the images that the generator made before, as
in the paper's ablation; without fine-tuning (`fine_tuning=none`) they only set ranges, and with
`reconstruction=on` they serve the reconstruction of `genie`. SynQ's parts are settings as everywhere
(`fine_tuning.low_pass=on` and so on); `gdfq-synq` has them with SynQ's loss and rate.

Measured on cifar10_resnet20 (91.0 in float on the first 1500 test images), W4A4, seed 0, 150 steps of the
generator alone and 200 in turns on 32 images each, at 3e-4 and for the last fifth a tenth of it (`standard`
has 300 and 400, on 64): 85.8, and 84.5 without turns on 256 images (the paper has 2.1 points between them).
The published schedule, 80000 steps on 200 images, loses 3.8 points. The generator, at its published rate and
weights, was far from done: its class loss fell from 5.7 to 2.3 alone and to 1.5 in turns.

Settings are those of the code for CIFAR-100. Where this differs:

* The generator is trained for the code's 4 epochs of 200 steps before there is a student. There the student
  comes along to observe its ranges, which start with images of a generator that has learned nothing; here
  they are averages over 2000 images of the generator as it is after these steps. 396 epochs follow.
* Rates fall to a tenth after 100, 200 and 300 of the student's epochs; in the code 4 epochs earlier.
* Inputs of more than 64 x 64 pixels get the paper's generator for ImageNet (the class chooses scale and shift
  of its BatchNorms), 10000 steps before the student, and 16 images a step. The student's rate is then 1e-5,
  as in AdaDFQ; GDFQ's is 1e-6 (`fine_tuning.lr=1e-6`).
* Budgets with fewer steps leave hard labels to images whose class the teacher finds likely, let the
  generator learn the statistics before the classes, and at a larger rate, see `zsq.budget.with_budget`.
* Ranges, quantizers, gradients: see `zsq show hast`.

`gdfq-synq`: table 7 of SynQ (arXiv:2603.18423). The images of GDFQ's generator, in turns; SynQ's low-pass
filter, class activation maps, soft labels for difficult images, with the weights that `synq` has. These go
with its form of distillation and its rate (20 times the sum over classes, 1e-5), which are taken too. HAST's
step up the slope, which belongs to SynQ's own baseline, is left out.
"""

from dataclasses import replace

from zsq.quant.scheme import Scheme
from zsq.recipe import Recipe
from zsq.recipes.sources import GDFQ_GENERATOR
from zsq.recipes.synq import SYNQ
from zsq.recover.settings import ClassLabels, Distillation, FineTuning, Turns

GDFQ_TUNING = FineTuning(
    epochs=396,
    batch_size=200,
    lr=1e-4,
    lr_decay_epochs=100,
    ranges="minmax",
    augment=False,
    distillation=Distillation(weight=1.0, mean="elements"),
    labels=ClassLabels(),
    turns=Turns(),
)
GDFQ = Recipe(
    name="gdfq",
    paper="Generative Low-bitwidth Data Free Quantization, ECCV 2020, arXiv:2003.03603",
    scheme=Scheme(ends="same"),
    synthesis=GDFQ_GENERATOR,
    reconstruction=None,
    fine_tuning=GDFQ_TUNING,
)
assert SYNQ.fine_tuning is not None
GDFQ_SYNQ = replace(
    GDFQ,
    name="gdfq-synq",
    paper="GDFQ with the three parts of SynQ, ICLR 2025, arXiv:2603.18423, table 7",
    fine_tuning=replace(SYNQ.fine_tuning, augment=False, perturbation=None, turns=Turns()),
)
