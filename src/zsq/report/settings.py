"""The settings of a run beside its recipe's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zsq.errors import UsageError
from zsq.pipeline import compose_recipe
from zsq.recipe_fields import describe
from zsq.recipes import get_recipe

NOT_THERE = "—"


@dataclass(frozen=True)
class Setting:
    """One setting: its value in the run, in the recipe, and what made them differ ("" if they do not)."""

    name: str
    value: str
    default: str
    reason: str


def settings_of(record: Mapping[str, Any]) -> tuple[list[Setting], bool]:
    """All settings of a run, by the name that `--set` takes, and whether the recipe's own are known.

    Args:
        record: what run.json holds.
    """
    used = flattened(record["recipe"])
    scheme, bits = record["recipe"]["scheme"], str(record["bits"])
    try:
        own = flattened(describe(get_recipe(str(record["recipe"]["name"]))))
        composed = compose_recipe(
            str(record["recipe"]["name"]),
            bits=bits,
            ends=scheme.get("ends"),
            placement=scheme.get("placement"),
            budget=str(record.get("budget", "paper")),
            input_size=record["model"]["spec"]["input_size"],
        )
    except UsageError:  # a recipe of the caller's own
        return [Setting(name, value, "", "") for name, value in used.items()], False
    budgeted = flattened(describe(composed))
    found = []
    for name in dict.fromkeys([*used, *own]):
        value, default = used.get(name, NOT_THERE), own.get(name, NOT_THERE)
        reason = ""
        if value != default:
            if name.startswith("scheme."):
                reason = "bits"
            elif value == budgeted.get(name, NOT_THERE):
                reason = f"budget {record.get('budget')}"
            else:
                reason = "set"
        found.append(Setting(name, value, default, reason))
    return found, True


def flattened(described: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as texts by dotted name, without name and paper."""
    found: dict[str, str] = {}
    for key, value in described.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{key}.")
        elif prefix or key not in ("name", "paper"):
            found[f"{prefix}{key}"] = "none" if value is None else str(value)
    return found
