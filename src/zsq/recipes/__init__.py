"""The table of recipes."""

from zsq.errors import UsageError
from zsq.recipe import Recipe
from zsq.recipes.baselines import GIVEN, GIVEN_NEAREST, NOISE, NOISE_NEAREST
from zsq.recipes.genie import GENIE
from zsq.recipes.genie_synq import GENIE_SYNQ
from zsq.recipes.hast import HAST
from zsq.recipes.sadag import SADAG
from zsq.recipes.synq import SYNQ

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (GENIE, SADAG, HAST, SYNQ, GENIE_SYNQ, GIVEN, GIVEN_NEAREST, NOISE, NOISE_NEAREST)
}


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in RECIPES:
        raise UsageError(f"There is no recipe {name!r}. There are: {', '.join(RECIPES)}.")
    return RECIPES[name]
