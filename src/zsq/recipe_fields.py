"""The settings of a recipe by dotted name: replaced from texts, listed, described for a record."""

import types
import typing
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from zsq.errors import UsageError
from zsq.recipe import Recipe

T = TypeVar("T")


def with_overrides(recipe: Recipe, overrides: typing.Mapping[str, str | int | float | bool | None]) -> Recipe:
    """Replace fields by dotted name, e.g. {"synthesis.steps": 500}; texts are read as the field's type.

    A stage that the recipe does not use is put in with its defaults by "on", e.g. {"filter": "on"}; "none"
    takes an optional stage out.

    Raises:
        UsageError: an unknown field, or a value that the field cannot take.
    """
    for name, value in overrides.items():
        recipe = _replace(recipe, name.split("."), value, name)
    return recipe


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries that JSON can hold; a stage's kind is under "kind".

    Optional stages that a recipe does not have (refinement, filter, fine_tuning ...) are left out, and so are
    settings that came later and have their default: what was run before them keeps its description.
    """

    def left_out(f: Any, value: Any) -> bool:
        return (f.default is None or "described" in f.metadata) and value == f.default

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            body = {
                f.name: plain(getattr(value, f.name))
                for f in fields(value)
                if not left_out(f, getattr(value, f.name))
            }
            return body if isinstance(value, Recipe) else {"kind": type(value).__name__, **body}
        return value

    result: dict[str, Any] = plain(recipe)
    return result


def flat(recipe: Recipe) -> dict[str, Any]:
    """All settings by the dotted name that `--set` takes; a stage without settings of its own is "on"."""
    found: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        for f in fields(value):
            inner = getattr(value, f.name)
            if is_dataclass(inner) and fields(inner):
                walk(inner, f"{prefix}{f.name}.")
            else:
                found[prefix + f.name] = "on" if is_dataclass(inner) else inner

    walk(recipe, "")
    return found


def _replace(target: T, path: list[str], value: Any, name: str) -> T:
    known = {f.name: f for f in fields(target)}  # type: ignore[arg-type]
    head, *rest = path
    hint = typing.get_type_hints(type(target)).get(head)
    whole = head in known and not rest and is_dataclass(getattr(target, head))
    switched = type(None) in typing.get_args(hint) and value in (None, "none", "on")
    if head not in known or (whole and not switched):
        raise UsageError(
            f"There is no setting {name!r}; at this place there are: {', '.join(sorted(known))}. "
            "`zsq show RECIPE` lists all of them."
        )
    current = getattr(target, head)
    if rest:
        if current is None:
            raise UsageError(f"Setting {name!r} is inside {head!r}, which this recipe does not use.")
        if not is_dataclass(current):
            raise UsageError(f"There is no setting {name!r}: {head!r} is a single value, {current!r}.")
        new: Any = _replace(current, rest, value, name)
    elif whole and value == "on":
        return target  # it is
    else:
        new = _convert(value, hint, name)
    return replace(target, **{head: new})  # type: ignore[type-var]


def _convert(value: Any, hint: Any, name: str) -> Any:
    options = (
        typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) else (hint,)
    )
    if typing.get_origin(hint) is typing.Literal:
        if value in options:
            return value
        raise UsageError(f"Setting {name!r} is one of {', '.join(map(repr, options))}, got {value!r}.")
    for option in options:
        if option is type(None) and (value is None or value == "none"):
            return None
        if is_dataclass(option) and value == "on":
            stage: Any = option
            return stage()
        if option is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if option is str and isinstance(value, str):
            return value
        if option in (int, float) and not isinstance(value, bool):
            try:
                number = option(value)
            except (TypeError, ValueError, OverflowError):
                continue
            if option is float or isinstance(value, (int, str)) or number == value:
                return _in_range(number, name)
    kinds = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise UsageError(f"Setting {name!r} needs a value of type {kinds}, got {value!r}.")


def _in_range(number: float, name: str) -> float:
    if number != number or number in (float("inf"), float("-inf")) or number < 0:
        raise UsageError(f"Setting {name!r} must be a finite number that is not negative, got {number}.")
    return number
