"""Mixup-class prompting: pictures by a text-to-image model from prompts that name several classes.

Paper: Park, Lee, Choi, Park, Hong, Choi, "Enhancing Generalization in Data-free Quantization via Mixup-class
Prompting", arXiv:2507.21947.

Followed: two classes in one prompt; the pictures are calibrated on without labels; block reconstruction.

Not published, and chosen here: the wording ("A photo of a kite and a hamster"), the sampling (random
permutations, so that every class is shown equally often), guidance (3.5, as GenQ's), the sampler's steps
(50), the number of pictures (1024, the usual count), and that nothing is filtered: an energy filter prefers
pictures of one class. The reconstruction is Genie's.

The paper's controls are settings: `synthesis.classes_per_prompt`, `synthesis.definitions` (against names of
several meanings), `synthesis.mixing=embeddings`, and with one class a prompt `synthesis.mixing=mixup` or
`cutmix` of finished pictures.
"""

from dataclasses import replace

from zsq.images.prompts import TextToImage
from zsq.recipes.genie import GENIE

MIXUP_CLASS = replace(
    GENIE,
    name="mixup_class",
    paper="Enhancing Generalization in Data-free Quantization via Mixup-class Prompting, arXiv:2507.21947",
    synthesis=TextToImage(classes_per_prompt=2),
)
