"""Genie with two of SynQ's three parts: filtered images, and aligned class activation maps.

Paper: Kim, Kim, Kang, "SynQ: Accurate Zero-shot Quantization by Synthesis-aware Fine-tuning", ICLR 2025,
arXiv:2603.18423, table 8, on Genie (arXiv:2212.04780). The paper gives results of the combination, not how
parts that were made for training end to end enter a reconstruction unit by unit. This is what is done here:

* All images go once through the low-pass filter before ranges are calibrated and units reconstructed
  (`low_pass`; there is no augmentation that could come before it). Cutoff: see `zsq show synq`.
* The unit that returns the last feature maps is learned on the distance of its output plus 50 times the
  distance of the class activation maps at its output (`reconstruction.maps`). Both networks' maps have the
  teacher's slopes, of the class that it takes the image for, as the student has nothing after this unit yet.
* Hard labels play no part in a reconstruction, so there is nothing to choose difficult images for.

Measured: below Genie on cifar100_resnet20s, by 1.0 points at W3A3 and 2.4 at W2A4 (five paired seeds, quick
budget, intervals leave out 0), and by 0.2 and 2.2 on cifar10_wrn16_1, where they hold 0
(`benchmarks/results/best.md`).
"""

from dataclasses import replace

from zsq.images.settings import LowPass
from zsq.recipe import Reconstruction
from zsq.recipes.genie import GENIE
from zsq.recover.settings import MapAlignment

GENIE_SYNQ = replace(
    GENIE,
    name="genie-synq",
    paper="Genie with the filter and the map alignment of SynQ, ICLR 2025, arXiv:2603.18423, table 8",
    low_pass=LowPass(),
    reconstruction=Reconstruction(maps=MapAlignment(weight=50.0)),
)
