"""TexQ: a generator whose images are held to a calibration image of their class, and mixed for the student.

Paper: Chen et al., "TexQ: Zero-shot Network Quantization with Texture Feature Distribution Calibration",
NeurIPS 2023. First one image a class is optimised as pixels: it is to show its class, meet the BatchNorm
statistics (loosely in the first half of the layers, tightly in the rest), and have the texture of a
photograph by Laws' filters. What the deeper layers receive for it is the centre of its class. The generator
is GDFQ's, trained in turns with the student, whose images are also held to the centre of their class. The
student sees each image mixed with another one, and learns what the teacher says of the mixture.

Measured as `zsq show gdfq` says, in as many steps, with 150 steps of the calibration images and a rate of
3e-5: 88.8 at W4A4, where `gdfq` has 85.8 and `adadfq` 89.1 (one seed). The distance to the centres stayed
where it was, at 1.2: its factor of 0.02 moves little in so few steps.

The paper's code was announced but is empty, so there is nothing to compare with; what is not known from the
paper's text is chosen here:

* Texture: the energies of nine Laws textures (the paper has k = 9 features) of an image, as shares of one
  another, are held to those of images whose power falls with the cube of the frequency, as that of
  photographs does (`images/texture.py`), with weight 1. The paper's bounds (0.3, 0.5) and tolerance (0.015)
  are not used, as we do not know of what. Without the textures: `synthesis.centres.texture_weight=0`.
* Factors of the BatchNorm distance of the calibration images (0.2 and 1.1) and of their class (5) are those
  of SynQ's code (arXiv:2603.18423), which has this part of TexQ for images optimised as pixels (`synq`).
  There, one set of targets serves all classes; here each image has the centre of its own class, by
  statistics over its positions. The factor of that distance is SynQ's too, 0.02.
* Loss and rates of generator and student are GDFQ's but for the mixtures, which have no hard labels: the
  larger share of each is uniform in 0.5 .. 1. The distillation is that of `hast` (a sum over classes, 20
  times), as soft labels are all there is, at its rate of 1e-5. The paper has 1e-3, a tenth of it every 100
  epochs, which is taken to be the generator's, and minibatches of 128.
* The rest: see `zsq show gdfq`.
"""

from dataclasses import replace

from zsq.recipes.gdfq import GDFQ, GDFQ_TUNING
from zsq.recipes.sources import TEXQ_GENERATOR
from zsq.recover.settings import Distillation, Mixup

TEXQ = replace(
    GDFQ,
    name="texq",
    paper="TexQ: Zero-shot Network Quantization with Texture Feature Distribution Calibration, NeurIPS 2023",
    synthesis=TEXQ_GENERATOR,
    fine_tuning=replace(
        GDFQ_TUNING, batch_size=128, lr=1e-5, distillation=Distillation(), labels=None, mixup=Mixup()
    ),
)
