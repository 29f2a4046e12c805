"""AdaDFQ and AdaSG: the generator and the student play a game of how far they are from the teacher.

Papers: Qian, Wang, Hong, Wang, "Adaptive Data-Free Quantization", CVPR 2023, arXiv:2303.06869, and
"Rethinking Data-Free Quantization as a Zero-Sum Game", AAAI 2023, arXiv:2302.09572. As GDFQ, but the
generator's class loss gives way to what the student makes of the images: their agreement (the entropy of the
softened difference of both networks' logits) is held within bounds, and both the difference and the sum of
the logits are to show the class. The student only maximises that agreement, at temperature 20; there are no
hard labels. The distance to the BatchNorm statistics counts 1 (in GDFQ 0.1). `adasg` has 0.1 for both class
losses, where `adadfq` has 0.2 for the difference.

Measured as `zsq show gdfq` says, in as many steps: `adadfq` 89.1 at W4A4, where `gdfq` has 85.8 (one seed;
the published schedule loses 1.6 points).

Settings are those of AdaDFQ's code for CIFAR. It has other bounds for some networks and bits
(`fine_tuning.turns.adaptability.lowest`, 0.3 for ResNet-18 at 4 and 5 bits). Where this differs:

* Before there is a student with ranges, the generator learns from the teacher alone: the cross-entropy of the
  class and the BatchNorm distance. In the code the game is on from the first step, with a student whose
  ranges are only being observed.
* The lowest agreement of a minibatch counts as 0, as in the code (`relative_agreement`).
* Inputs of more than 64 x 64 pixels have another generator and smaller batches, as `zsq show gdfq` says;
  the code's temperature for ImageNet is 5 (`fine_tuning.agreement.temperature=5`), and the rate falls only
  after 350 epochs (`fine_tuning.lr_decay_epochs=350`).
* The rest: see `zsq show gdfq`.
"""

from dataclasses import replace

from zsq.recipes.gdfq import GDFQ, GDFQ_TUNING
from zsq.recipes.sources import ADADFQ_GENERATOR
from zsq.recover.settings import Adaptability, Agreement, Turns

ADADFQ_TUNING = replace(
    GDFQ_TUNING,
    batch_size=16,
    distillation=None,
    labels=None,
    agreement=Agreement(),
    turns=Turns(adaptability=Adaptability()),
)
ADADFQ = replace(
    GDFQ,
    name="adadfq",
    paper="Adaptive Data-Free Quantization, CVPR 2023, arXiv:2303.06869",
    synthesis=ADADFQ_GENERATOR,
    fine_tuning=ADADFQ_TUNING,
)
ADASG = replace(
    ADADFQ,
    name="adasg",
    paper="Rethinking Data-Free Quantization as a Zero-Sum Game, AAAI 2023, arXiv:2302.09572",
    fine_tuning=replace(
        ADADFQ_TUNING, turns=Turns(adaptability=Adaptability(disagreement=0.1, agreement=0.1))
    ),
)
