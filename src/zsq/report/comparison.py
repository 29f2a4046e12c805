"""Several runs beside each other: what they came to, and differences between runs of the same seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zsq.bench_table import paired_difference
from zsq.report.charts import Row

SEPARATOR = " · "  # between the parts of a label


@dataclass(frozen=True)
class Summary:
    """What runs are compared by.

    Attributes:
        label: of the run in the page.
        seed: of it.
        network: SHA-256 of the teacher's weights.
        configuration: all settings but the seed, as text; runs that share it differ by their seed alone.
        figures: by title; None where the run has none.
        units: signal-to-noise of its units on its images, in decibels, by name.
    """

    label: str
    seed: int
    network: str
    configuration: str
    figures: Mapping[str, float | None]
    units: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A configuration against that of the first run, over the seeds that both have.

    Attributes:
        label, reference: of the two configurations.
        pairs: seeds that both have.
        figures: (title, mean, low, high); the interval is None with one pair.
        units: mean difference of a unit's signal-to-noise, where the units have the same names.
    """

    label: str
    reference: str
    pairs: int
    figures: tuple[tuple[str, float, float | None, float | None], ...]
    units: tuple[Row, ...]


def run_labels(records: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> list[str]:
    """What tells each run from the others, no text twice; "" for the only one.

    What differs among model, recipe, bits, placement, budget and seed; where that is the same, the folder.

    Args:
        records: what each run.json holds.
        folders: their names; "" for a run that is in none.
    """
    if len(records) == 1:
        return [""]
    parts = [
        (
            str(record["model"]["name"]),
            str(record["recipe"]["name"]),
            str(record["bits"]),
            str(record["recipe"]["scheme"].get("placement", "")),
            f"budget {record.get('budget')}",
            f"seed {record['seed']}",
        )
        for record in records
    ]
    telling = [k for k in range(len(parts[0])) if len({part[k] for part in parts}) > 1]
    labels = [SEPARATOR.join(part[k] for k in telling if part[k]) for part in parts]
    again = [not label or labels.count(label) > 1 for label in labels]
    for k, folder in enumerate(folders):
        if again[k]:
            labels[k] = SEPARATOR.join(text for text in (labels[k], folder or f"run {k + 1}") if text)
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: k + 1].count(label)})"
        for k, label in enumerate(labels)
    ]


def configuration_of(record: Mapping[str, Any]) -> str:
    """All that a run was made with but its seed, as text."""
    used = {key: record.get(key) for key in ("recipe", "bits", "given_images_sha256", "given_labels_sha256")}
    return json.dumps(used, sort_keys=True)


def differences(runs: Sequence[Summary]) -> list[Difference]:
    """Every other configuration of the first run's network against that of the first run.

    Source: the interval is that of `zsq bench`, see `zsq.bench_table.paired_difference`.
    """
    first = runs[0]
    reference = {r.seed: r for r in runs if _key(r) == _key(first)}
    others: dict[str, dict[int, Summary]] = {}
    for run in runs:
        if run.network == first.network and run.configuration != first.configuration:
            others.setdefault(run.configuration, {}).setdefault(run.seed, run)
    return [_difference(found, reference) for found in others.values()]


def _key(run: Summary) -> tuple[str, str]:
    return run.network, run.configuration


def _without_seed(run: Summary) -> str:
    """The label of a run's configuration: its own without the seed, unless only that is in it."""
    parts = [part for part in run.label.split(SEPARATOR) if part != f"seed {run.seed}"]
    return SEPARATOR.join(parts) or run.label


def _difference(found: Mapping[int, Summary], reference: Mapping[int, Summary]) -> Difference:
    common = sorted(found.keys() & reference.keys())
    figures = []
    for title in next(iter(found.values())).figures:
        mine, theirs = (
            {s: v for s, run in runs.items() if (v := run.figures.get(title)) is not None}
            for runs in (found, reference)
        )
        difference: Any = paired_difference(mine, theirs)
        if difference is not None:
            figures.append((title, difference["mean"], difference["low"], difference["high"]))
    rows = []
    for name in reference[common[0]].units if common else ():
        gaps = [
            found[s].units[name] - reference[s].units[name]
            for s in common
            if name in found[s].units and name in reference[s].units
        ]
        if gaps:
            mean = sum(gaps) / len(gaps)
            rows.append(Row(name, ((0, mean),), f"{mean:+.1f} dB".replace("-", "−")))
    label, other = (_without_seed(next(iter(runs.values()))) for runs in (found, reference))
    return Difference(label, other, len(common), tuple(figures), tuple(rows))
