"""GenQ: pictures of single classes by a text-to-image model, filtered by what the model knows of its data.

Paper: Li, Kim, Lee, Kundu, Panda, "GenQ: Quantization in Low Data Regimes with Generative Synthetic Data",
ECCV 2024, arXiv:2312.05272 (first version: StableQ). The data-free regime: class names only.

Followed: one class a prompt, with an adjective; guidance 3.5; twice as many pictures as are kept; the filter
by energy, then that by BatchNorm sensitivity, each keeping the same share of every class; block
reconstruction with learned rounding.

Not published, and chosen here: the list of adjectives, the sampler's steps (50), how many pictures each
filter leaves out (a factor of the square root of 2 each), the norm of the distance to the BatchNorm
statistics (in units of the stored deviations), and that the least fitting picture is left out again and again
until enough are. The reconstruction is Genie's. The fine-tuning that the paper adds, and the token that it
learns from a few real images, are not part of this recipe.

For networks without BatchNorm the second filter is the one by patches:
`--set filter.then.method=patch_entropy`.
"""

from dataclasses import replace

from zsq.images.prompts import ADJECTIVES, TextToImage
from zsq.images.settings import Filter
from zsq.recipes.genie import GENIE

GENQ = replace(
    GENIE,
    name="genq",
    paper="GenQ: Quantization in Low Data Regimes with Generative Synthetic Data, ECCV 2024, "
    "arXiv:2312.05272",
    synthesis=TextToImage(num_images=2048, adjectives=ADJECTIVES),
    filter=Filter(method="energy", keep=1448, then=Filter(method="bn_sensitivity", keep=1024)),
)
