"""What a recipe's settings are, in the words of the code: names, types and docstrings."""

import re
import types
import typing
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any

from zsq import recipes
from zsq.recipe import Recipe
from zsq.recipe_fields import flat


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe, by the dotted name that `--set` takes."""

    name: str
    value: Any
    type: str
    meaning: str


def recipe_settings(recipe: Recipe) -> list[Setting]:
    """What can be set in a recipe, in pipeline order; the meaning is what the docstring of its class says."""
    found = []
    for name, value in flat(recipe).items():
        if name in ("name", "paper"):
            continue
        *path, leaf = name.split(".")
        owner: Any = recipe
        for part in path:
            owner = getattr(owner, part)
        hint = typing.get_type_hints(type(owner))[leaf]
        found.append(Setting(name, value, type_text(hint), attribute_meanings(type(owner)).get(leaf, "")))
    return found


def recipe_docstring(recipe: Recipe) -> str:
    """What stands at the top of the file that a recipe is written in; a file of its name is asked first."""
    modules = [m for m in vars(recipes).values() if isinstance(m, types.ModuleType)]
    own = [m for m in modules if m.__name__.rpartition(".")[2] == recipe.name.replace("-", "_")]
    holding = [m for m in modules if any(value is recipe for value in vars(m).values())]
    return cleandoc(next((m.__doc__ for m in (*own, *holding) if m.__doc__), recipe.paper))


def attribute_meanings(owner: type) -> dict[str, str]:
    """{"steps": "optimizer steps a unit"} from the "Attributes:" of a class's docstring."""
    text = cleandoc(owner.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\w)", f"\n{text}"):
        names, _, meaning = entry.partition(":")
        found |= {name.strip(): " ".join(meaning.split()).rstrip(".") for name in names.split(",")}
    return found


def type_text(hint: Any) -> str:
    """int -> "int", int | None -> "int or none", Literal["a", "b"] -> "a or b"."""
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, types.UnionType):
        return " or ".join(type_text(option) for option in typing.get_args(hint))
    return "none" if hint is type(None) else str(getattr(hint, "__name__", hint))
