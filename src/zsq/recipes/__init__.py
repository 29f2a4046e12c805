"""The table of recipes."""

from zsq.errors import UsageError
from zsq.recipe import Recipe
from zsq.recipes.adadfq import ADADFQ, ADASG
from zsq.recipes.baselines import GIVEN, GIVEN_NEAREST, NOISE, NOISE_NEAREST
from zsq.recipes.best import BEST
from zsq.recipes.dfq import DFQ
from zsq.recipes.gdfq import GDFQ, GDFQ_SYNQ
from zsq.recipes.genie import GENIE
from zsq.recipes.genie_synq import GENIE_SYNQ
from zsq.recipes.genq import GENQ
from zsq.recipes.hast import HAST
from zsq.recipes.intraq import INTRAQ
from zsq.recipes.mixup_class import MIXUP_CLASS
from zsq.recipes.psaq_vit import PSAQ_VIT
from zsq.recipes.sadag import SADAG
from zsq.recipes.synq import SYNQ
from zsq.recipes.texq import TEXQ
from zsq.recipes.zeroq import DSG, ZEROQ, ZEROQ_FT

_ALL = (
    GENIE,
    SADAG,
    ZEROQ,
    ZEROQ_FT,
    DSG,
    DFQ,
    GDFQ,
    GDFQ_SYNQ,
    ADASG,
    ADADFQ,
    TEXQ,
    INTRAQ,
    HAST,
    SYNQ,
    GENIE_SYNQ,
    BEST,
    PSAQ_VIT,
    GENQ,
    MIXUP_CLASS,
    GIVEN,
    GIVEN_NEAREST,
    NOISE,
    NOISE_NEAREST,
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in RECIPES:
        raise UsageError(f"There is no recipe {name!r}. There are: {', '.join(RECIPES)}.")
    return RECIPES[name]
