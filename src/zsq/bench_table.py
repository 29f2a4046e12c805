"""Rows of a benchmark -> means over seeds, paired differences, and the table as JSON and Markdown."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MARK = "<!-- written by `zsq bench` after every row: edit the benchmark file, not this one -->"
MISSING = "–"
# 97.5 % quantiles of Student's t for 1..30 degrees of freedom.
# Source: NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


# Heading -> where the figure is in a row's "diagnostics"
DIAGNOSTICS = {
    "loss": ("others", "loss"),
    "sharpness": ("others", "sharpness"),
    "gradient norm": ("generalisation", "other_gradient_norm"),
    "gap": ("generalisation", "gap"),
    "alignment of means": ("alignment", "of_means"),
    "alignment with nearest": ("alignment", "nearest"),
}


@dataclass(frozen=True, kw_only=True)
class NetworkResults:
    """What is known of one network, finished or not.

    Attributes:
        name: heading of its table.
        settings: what was said of it in the benchmark file, for the reader.
        recipes: labels in order; the first is what the others are compared with.
        bits: columns in order.
        seeds: those that every cell should have.
        float_accuracy: {"top1", "top5", "num_images"} of the unquantized network; None before it was
        evaluated. rows: finished rows by (label, bits, seed); "top1" in percent, "seconds" by stage (None:
        not known). failures: error texts by (label, bits, seed).
    """

    name: str
    settings: Mapping[str, Any]
    recipes: Sequence[str]
    bits: Sequence[str]
    seeds: Sequence[int]
    float_accuracy: Mapping[str, Any] | None
    rows: Mapping[tuple[str, str, int], Mapping[str, Any]]
    failures: Mapping[tuple[str, str, int], str] = field(default_factory=dict)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divided by n - 1; None for one value).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float]
) -> dict[str, float | int | None] | None:
    """Mean of values - reference over the seeds that both have, with a two-sided 95 % t-interval.

    The interval is mean -+ t(0.975, n - 1) * s / sqrt(n), s the sample standard deviation of the differences.
    It covers the randomness of seeds, not that of the evaluation images. Beyond 31 seeds the quantile of 30
    degrees of freedom is kept, which is slightly too wide.

    Args:
        values: by seed.
        reference: by seed.

    Returns:
        "mean", "low", "high" (None with one common seed) and "n"; None without a common seed.
    """
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    mean, deviation = mean_and_deviation([values[s] - reference[s] for s in seeds])
    if deviation is None:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = T_QUANTILES[min(len(seeds) - 1, len(T_QUANTILES)) - 1] * deviation / math.sqrt(len(seeds))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(seeds)}


def summarise(header: Mapping[str, Any], networks: Sequence[NetworkResults]) -> dict[str, Any]:
    """The whole table as JSON can hold it.

    Args:
        header: "name", "command", "settings", "recipes" as the reader should see them.
        networks: in order.

    Returns:
        `header` with "date" (of the last finished row), "versions", "machines" (of all rows) and "networks":
        for every cell the seeds' values, mean, deviation and paired difference.
    """
    rows = [row for network in networks for row in network.rows.values()]
    return {
        **header,
        "date": max((row["finished"][:10] for row in rows), default=None),
        "versions": _distinct(_listed(row["versions"]) for row in rows),
        "machines": _distinct(row["machine"] for row in rows),
        "networks": [_summarise_network(network) for network in networks],
    }


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The table as Markdown, from what `summarise` returns."""
    lines = [f"# Benchmark {summary['name']}", "", MARK, "", f"    {summary['command']}", ""]
    for title, texts in (("Versions", summary["versions"]), ("Machine", summary["machines"])):
        lines.append(f"* {title}: {'; '.join(texts) or MISSING}")
    lines += [
        f"* Last row: {summary['date'] or MISSING} (UTC)",
        f"* Settings: {_listed(summary['settings'])}",
    ]
    lines += [f"* Recipe {label}: {_listed(about)}" for label, about in summary["recipes"].items()]
    lines += [
        "* Cells: top-1 accuracy in percent on real labelled images, mean ± sample standard deviation over "
        f"seeds; {MISSING} was not run yet. Intervals are over seeds, not over images.",
        "",
    ]
    for network in summary["networks"]:
        lines += _network_lines(network)
    return "\n".join(lines).rstrip() + "\n"


def _summarise_network(network: NetworkResults) -> dict[str, Any]:
    cells = []
    for label in network.recipes:
        for bits in network.bits:
            values = _by_seed(network, label, bits)
            mean, deviation = mean_and_deviation(list(values.values())) if values else (None, None)
            reference = _by_seed(network, network.recipes[0], bits)
            cells.append(
                {
                    "recipe": label,
                    "bits": bits,
                    "n": len(values),
                    "mean": mean,
                    "deviation": deviation,
                    "top1": {str(seed): value for seed, value in values.items()},
                    "difference": paired_difference(values, reference)
                    if label != network.recipes[0]
                    else None,
                    "diagnostics": _mean_diagnostics(network, label, bits),
                    "failures": {
                        str(seed): network.failures[label, bits, seed]
                        for seed in network.seeds
                        if (label, bits, seed) in network.failures
                    },
                }
            )
    return {
        "name": network.name,
        "settings": dict(network.settings),
        "float": None if network.float_accuracy is None else dict(network.float_accuracy),
        "recipes": list(network.recipes),
        "bits": list(network.bits),
        "num_seeds": len(network.seeds),
        "cells": cells,
        "seconds": {label: _mean_seconds(network, label) for label in network.recipes},
    }


def _by_seed(network: NetworkResults, label: str, bits: str) -> dict[int, float]:
    found = {seed: network.rows.get((label, bits, seed)) for seed in network.seeds}
    return {seed: float(row["top1"]) for seed, row in found.items() if row is not None}


def _mean_seconds(network: NetworkResults, label: str) -> dict[str, float]:
    """Mean over the rows of a recipe by stage; rows in which a stage was interrupted do not count for it."""
    seconds: dict[str, list[float]] = {}
    for (name, _, _), row in network.rows.items():
        if name == label:
            for stage, value in row["seconds"].items():
                if value is not None:
                    seconds.setdefault(stage, []).append(value)
    return {stage: round(statistics.fmean(values), 3) for stage, values in seconds.items()}


def _mean_diagnostics(network: NetworkResults, label: str, bits: str) -> dict[str, float] | None:
    """Means over the seeds of the figures in `DIAGNOSTICS`; None if no row has them."""
    rows = [network.rows.get((label, bits, seed)) for seed in network.seeds]
    found = [row["diagnostics"] for row in rows if row is not None and "diagnostics" in row]
    if not found:
        return None
    return {
        heading: statistics.fmean(each[part][figure] for each in found)
        for heading, (part, figure) in DIAGNOSTICS.items()
    }


def _network_lines(network: Mapping[str, Any]) -> list[str]:
    cells = {(cell["recipe"], cell["bits"]): cell for cell in network["cells"]}
    recipes, bits = network["recipes"], network["bits"]
    lines = [f"## {network['name']}: {_float_text(network['float'])}", ""]
    lines += [f"{_listed(network['settings'])}.", ""]
    top1 = [
        [label, *(_accuracy_text(cells[label, b], network["num_seeds"]) for b in bits)] for label in recipes
    ]
    lines += _table(["recipe", *bits], top1)
    if len(recipes) > 1 and any(cell["difference"] is not None for cell in network["cells"]):
        others = [[label, *(_difference_text(cells[label, b]) for b in bits)] for label in recipes[1:]]
        lines += [f"Difference from {recipes[0]} with the same seeds, mean [95 % t-interval]:", ""]
        lines += _table(["recipe", *bits], others)
    described = [cell for cell in network["cells"] if cell["diagnostics"] is not None]
    if described:
        lines += ["Diagnostics of the student on real labelled images, means over seeds:", ""]
        figures = [
            [cell["recipe"], cell["bits"], *(f"{v:.4g}" for v in cell["diagnostics"].values())]
            for cell in described
        ]
        lines += _table(["recipe", "bits", *DIAGNOSTICS], figures)
    stages = list(dict.fromkeys(stage for label in recipes for stage in network["seconds"][label]))
    if stages:
        times = [_seconds_texts(label, network["seconds"][label], stages) for label in recipes]
        lines += ["Mean seconds by stage; images are made once for all bits:", ""]
        lines += _table(["recipe", *stages, "total"], times)
    for cell in network["cells"]:
        for seed, text in cell["failures"].items():
            lines += [f"Failed: {cell['recipe']} {cell['bits']} seed {seed}: {text}", ""]
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [" | ".join(text.replace("|", "\\|") for text in row) for row in rows]
    rule = "|".join(["---", *["---:"] * (len(head) - 1)])
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {line} |" for line in body), ""]


def _float_text(accuracy: Mapping[str, Any] | None) -> str:
    if accuracy is None:
        return "float not evaluated yet"
    top5 = "" if accuracy["top5"] is None else f" (top-5 {accuracy['top5']:.2f} %)"
    return f"float {accuracy['top1']:.2f} %{top5} on {accuracy['num_images']} images"


def _accuracy_text(cell: Mapping[str, Any], num_seeds: int) -> str:
    if cell["n"] == 0:
        return "failed" if cell["failures"] else MISSING
    spread = "" if cell["deviation"] is None else f" ± {cell['deviation']:.2f}"
    return f"{cell['mean']:.2f}{spread}" + ("" if cell["n"] == num_seeds else f" (n={cell['n']})")


def _difference_text(cell: Mapping[str, Any]) -> str:
    difference = cell["difference"]
    if difference is None:
        return MISSING
    text = f"{difference['mean']:+.2f}"
    if difference["low"] is not None:
        text += f" [{difference['low']:+.2f}, {difference['high']:+.2f}]"
    return text.replace("-", "−")


def _seconds_texts(label: str, seconds: Mapping[str, float], stages: Sequence[str]) -> list[str]:
    texts = [f"{seconds[stage]:.1f}" if stage in seconds else MISSING for stage in stages]
    return [label, *texts, f"{sum(seconds.values()):.1f}" if seconds else MISSING]


def _listed(values: Mapping[str, Any]) -> str:
    """`{"budget": "quick", "seeds": [0, 1]}` -> "budget quick, seeds 0 1"."""
    texts = []
    for key, value in values.items():
        many = isinstance(value, (list, tuple))
        texts.append(f"{key} {' '.join(map(str, value)) if many else value}")
    return ", ".join(texts)


def _distinct(texts: Iterable[str]) -> list[str]:
    return sorted(set(texts))
