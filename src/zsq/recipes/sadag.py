"""SADAG: Genie's images, moved until the student's gradients change little around each of them.

Paper: Hoang-Anh, Pham, Le, Cai, Do, "Sharpness-Aware Data Generation for Zero-shot Quantization", ICML 2024,
arXiv:2510.07018.

TODO
"""

from dataclasses import replace

from zsq.images.settings import Refinement
from zsq.recipes.genie import GENIE

SADAG = replace(
    GENIE,
    name="sadag",
    paper="Sharpness-Aware Data Generation for Zero-shot Quantization, ICML 2024, arXiv:2510.07018",
    refinement=Refinement(),
)
