"""What a run.json must hold for the commands that read it; checked once, where it is read."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zsq.errors import UsageError

Check = tuple[str, Callable[[Any], bool]]  # what to call it in a message, and whether a value is one


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def or_none(check: Check) -> Check:
    return f"{check[0]} or null", lambda value: value is None or check[1](value)


def _list_of(check: Check) -> Check:
    return f"a list, each {check[0]}", lambda value: isinstance(value, list) and all(map(check[1], value))


def table_of(check: Check) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, dict) and all(map(check[1], value.values()))

    return f"a table, each value {check[0]}", fits


TEXT: Check = ("a text", lambda value: isinstance(value, str))
FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
NUMBER: Check = ("a number", _is_number)
COUNT: Check = ("a whole number that is not negative", _is_count)
TABLE: Check = ("a table", lambda value: isinstance(value, dict))
COUNTS: Check = (
    "three whole numbers",
    lambda v: isinstance(v, list) and len(v) == 3 and all(map(_is_count, v)),
)

NEEDED: dict[str, Check] = {
    "bits": TEXT,
    "seed": COUNT,
    "device": TEXT,
    "model": TABLE,
    "model.name": TEXT,
    "model.sha256": TEXT,
    "model.parameters": COUNT,
    "model.source": TABLE,
    "model.source.kind": TEXT,
    "model.source.name": TEXT,
    "model.source.weights": or_none(TEXT),
    "model.spec": TABLE,
    "model.spec.input_size": COUNTS,
    "model.spec.mean": _list_of(NUMBER),
    "model.spec.std": _list_of(NUMBER),
    "model.spec.crop_fraction": NUMBER,
    "model.spec.interpolation": TEXT,
    "recipe": TABLE,
    "recipe.name": TEXT,
    "recipe.paper": TEXT,
    "recipe.fold_batch_norm": FLAG,
    "recipe.scheme": TABLE,
    "recipe.scheme.ends": TEXT,
    "versions": table_of(TEXT),
    "versions.zsq": TEXT,
    "versions.torch": TEXT,
}
NEEDED_WHEN_DONE: dict[str, Check] = {
    "timings": table_of(NUMBER),
    "results": TABLE,
    "results.measured": TABLE,
    "results.estimated_without_data": TABLE,
    "results.units": _list_of(TABLE),
    "results.units.*.name": TEXT,
    "results.units.*.snr": or_none(NUMBER),
    "results.units.*.snr_nearest": or_none(NUMBER),
    "results.size": TABLE,
    "results.size.teacher_bytes": COUNT,
    "results.size.student_bytes": COUNT,
    "results.size.student_parts": table_of(COUNT),
}
ACCURACY: dict[str, Check] = {"top1": NUMBER, "top5": or_none(NUMBER), "num_images": COUNT}
_ACCURACY: Check = ("an accuracy", lambda value: is_table_with(value, ACCURACY))
_AGREEMENT: Check = (
    "an agreement",
    lambda v: is_table_with(v, {"snr": or_none(NUMBER), "num_images": COUNT}),
)
IF_THERE: dict[str, Check] = {
    "command": or_none(TEXT),
    "budget": TEXT,
    "overrides": TABLE,
    "given_images_sha256": or_none(TEXT),
    "given_labels_sha256": or_none(TEXT),
    "model.source.notes": _list_of(TEXT),
    "recipe.scheme.placement": TEXT,
    "recipe.equalization": or_none(TABLE),
    "results.measured.data": TEXT,
    "results.measured.teacher": _ACCURACY,
    "results.measured.student": _ACCURACY,
    "results.estimated_without_data.holdout": _AGREEMENT,
    "results.estimated_without_data.holdout.top1_agreement": NUMBER,
    "results.estimated_without_data.calibration_images": _AGREEMENT,
    "results.estimated_without_data.calibration_images.top1_agreement": NUMBER,
    "results.estimated_without_data.unit_snr": table_of(or_none(NUMBER)),
}


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Refuse a record that lacks what readers of a run need, or has it as another type.

    Args:
        record: what run.json holds, of the right format.
        where: the file, for the message.

    Raises:
        UsageError: so.
    """
    needed = {**NEEDED, **(NEEDED_WHEN_DONE if record.get("status") == "done" else {})}
    for name, (expected, fits) in {**needed, **IF_THERE}.items():
        for found in _values(record, name.split(".")):
            if found is _MISSING and name in needed:
                raise UsageError(f"{where} is incomplete or damaged: it has no {name!r}. Quantize again.")
            if found is not _MISSING and not fits(found):
                raise UsageError(
                    f"{where} is incomplete or damaged: {name!r} is {_shown(found)}, expected {expected}. "
                    "Quantize again."
                )


_MISSING = object()


def _values(value: Any, path: list[str]) -> Iterator[Any]:
    """What is at a dotted place, `_MISSING` if nothing; of a list at "*", each."""
    if not path:
        yield value
    elif path[0] == "*":
        for item in value if isinstance(value, list) else ():
            yield from _values(item, path[1:])
    elif isinstance(value, Mapping) and path[0] in value:
        yield from _values(value[path[0]], path[1:])
    else:
        yield _MISSING


def is_table_with(value: Any, fields: Mapping[str, Check]) -> bool:
    """Whether a value is a dictionary that has these fields, each as it should be."""
    return isinstance(value, dict) and all(k in value and check[1](value[k]) for k, check in fields.items())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
