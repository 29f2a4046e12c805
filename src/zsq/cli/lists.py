"""The commands that list what there is: recipes, their settings, models."""

from typing import Annotated, Any

import typer

from zsq.cli.arguments import (
    BitsOption,
    BudgetOption,
    DebugOption,
    EndsOption,
    JsonOption,
    PlacementOption,
    SetOption,
    read_input_size,
    read_settings,
)
from zsq.cli.terminal import grid, indented, print_json, print_parts


def recipes(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the recipes."""
    from zsq.recipes import RECIPES

    rows = [(recipe.name, recipe.paper) for recipe in RECIPES.values()]
    if as_json:
        print_json([{"name": name, "paper": paper} for name, paper in rows])
    else:
        print_parts(grid(("recipe", "what it is"), rows), "", "All settings of one: zsq show RECIPE")


def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="one of `zsq recipes`")],
    bits: BitsOption = "W4A4",
    ends: EndsOption = None,
    placement: PlacementOption = None,
    budget: BudgetOption = "standard",
    settings: SetOption = None,
    input_size: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="of the model; budgets are smaller for large images")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a recipe and every setting of it as `quantize` would use it, by the name that --set takes."""
    from zsq.cli.recipe_help import recipe_docstring, recipe_settings
    from zsq.pipeline import compose_recipe
    from zsq.recipes import get_recipe

    original = get_recipe(recipe)
    composed = compose_recipe(
        recipe,
        bits=bits,
        ends=ends,
        placement=placement,
        budget=budget,
        overrides=read_settings(settings),
        input_size=read_input_size(input_size),
    )
    found = recipe_settings(composed)
    if as_json:
        listed = {s.name: {"value": s.value, "type": s.type, "meaning": s.meaning} for s in found}
        print_json({"name": composed.name, "paper": composed.paper, "budget": budget, "settings": listed})
        return
    print_parts(
        recipe_docstring(original),
        "",
        composed.paper,
        "",
        f"Settings with --bits {composed.scheme.bits} --budget {budget} for {input_size or 'small'} images:",
        *(part for s in found for part in (f"{s.name} = {_plain(s.value)}  ({s.type})", indented(s.meaning))),
    )


def models(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List what MODEL can be."""
    from zsq.models import models as entries

    rows = [(entry.model, entry.input_size, entry.description) for entry in entries()]
    rows.append(("path/to/run", "as the run says", "a run folder: its teacher, or its student in `evaluate`"))
    if as_json:
        print_json([dict(zip(("model", "input_size", "description"), row, strict=True)) for row in rows])
    else:
        print_parts(grid(("MODEL", "input size", "what it is"), rows))


def _plain(value: Any) -> str:
    """A value as `--set` takes it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
