"""Baselines that every comparison needs.

* `given`: the reconstruction of Genie on images that the user brings (`--images`), e.g. 1000 real training
  images.
* `noise`: the same reconstruction on Gaussian noise.
* `noise-nearest`: ranges from Gaussian noise, rounding to nearest, nothing optimised.
* `given-nearest`: the same with ranges from images that the user brings.
"""

from dataclasses import replace

from zsq.recipe import GaussianNoise, GivenImages
from zsq.recipes.genie import GENIE

GIVEN = replace(
    GENIE,
    name="given",
    paper="reconstruction of Genie (arXiv:2212.04780) on given images",
    synthesis=GivenImages(),
)
NOISE = replace(
    GENIE,
    name="noise",
    paper="reconstruction of Genie (arXiv:2212.04780) on Gaussian noise",
    synthesis=GaussianNoise(),
)
NOISE_NEAREST = replace(
    NOISE,
    name="noise-nearest",
    paper="ranges of least 2.4-norm error on Gaussian noise, rounding to nearest",
    reconstruction=None,
)
GIVEN_NEAREST = replace(
    GIVEN,
    name="given-nearest",
    paper="ranges of least 2.4-norm error on given images, rounding to nearest",
    reconstruction=None,
)
