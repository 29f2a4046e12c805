"""Budgets: images and steps together, for settings that a user did not give."""

from dataclasses import replace

from zsq.errors import UsageError
from zsq.images.settings import Synthesis
from zsq.recipe import GaussianNoise, GivenImages, Recipe

BUDGETS = ("quick", "standard", "paper")
# name -> images, synthesis steps a batch, reconstruction steps a unit
COUNTS = {"quick": (128, 150, 200), "standard": (256, 500, 1000)}


def with_budget(recipe: Recipe, budget: str) -> Recipe:
    """The recipe with the counts of a budget; "paper" keeps the published ones, which the recipe holds.

    Raises:
        UsageError: an unknown budget.
    """
    if budget not in BUDGETS:
        raise UsageError(f"The budget must be one of {', '.join(BUDGETS)}, got {budget!r}.")
    if budget == "paper":
        return recipe
    num_images, synthesis_steps, reconstruction_steps = COUNTS[budget]
    source = recipe.synthesis
    if isinstance(source, Synthesis):
        source = replace(source, num_images=num_images, steps=synthesis_steps)
    elif isinstance(source, (GaussianNoise, GivenImages)):
        source = replace(source, num_images=num_images)
    reconstruction = recipe.reconstruction
    if reconstruction is not None:
        reconstruction = replace(reconstruction, steps=reconstruction_steps)
    return replace(recipe, synthesis=source, reconstruction=reconstruction)
