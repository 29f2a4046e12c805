"""How well the drop in accuracy can be told without data, and the curve with which zsq tells it.

    ZSQ_DATA=DIR python benchmarks/estimate.py measure --rows rows.jsonl
    python benchmarks/estimate.py fit --rows rows.jsonl --write benchmarks/results/estimate.md

`measure` quantizes the networks of w8a8.toml in several ways at few images and steps, so that the drop covers
all from nothing to everything, and keeps for each what synthetic images say of it and what real labelled ones
say. The synthetic images are Genie's: some to quantize with, as many of another seed to predict from (32 of
them, the units' signal-to-noise from all). Rows that are there are not made again.

`fit` fits curves to the rows and predicts every network by a fit to the others. The interval is set by the
errors of such predictions among the networks of the fit, at the 90 % quantile; for the table, without the
predicted network.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zsq.bench_file import Entry, read_bench
from zsq.bench_plan import Plan, plan_network
from zsq.estimate import CHUNK, LEAST, Fit, Predictors, feature, predictors, spread
from zsq.evaluate import accuracy, agreement, unit_signal_to_noise
from zsq.images.pixel_settings import MadeInBatches
from zsq.pipeline import quantize, synthesize_images
from zsq.recipe import Recipe
from zsq.recipe_images import Batches
from zsq.stages import captured
from zsq.student_networks import attached

NETWORKS = Path(__file__).with_name("w8a8.toml")
HELD_OUT = 32  # images to predict from, as many as a run holds out
# For large inputs or not: images, steps a batch, steps a unit, real images
COUNTS = {False: (64, 80, 30, 1500), True: (32, 50, 15, 300)}
LEARNED, NEAREST = ("W4A4", "W3A3", "W2A4"), ("W8A8", "W6A6", "W5A5", "W4A4", "W3A3")
SMALL_DROP = 15.0  # points, above which nobody asks how much exactly
RIDGE, BEND = 0.5, 2.0  # of the fit: penalty of the coefficients, points from which errors count linearly
NOMINAL = 0.9
CANDIDATES = (
    ("disagreement",),
    ("flips",),
    ("weakest_unit",),
    ("flips", "weakest_unit"),
    ("disagreement", "weakest_unit"),
    ("disagreement", "weakest_unit", "confidence"),
    ("flips", "weakest_unit", "confidence"),
    ("disagreement", "flips", "weakest_unit"),
)
Array = NDArray[np.float64]


def measure(file: Path) -> None:
    """Make the rows that are missing in a file."""
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["network"], row["recipe"], row["bits"]) for row in found}
    for network in read_bench(NETWORKS).networks:
        made: dict[str, Any] = {}
        for label, bits, settings, plan in jobs(network.name):
            if (network.name, label, bits) in done:
                continue
            made = made or images_of(plan, settings)
            row = {"network": network.name, "recipe": label, "bits": bits, **measured(plan, settings, made)}
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")


def jobs(name: str) -> Iterator[tuple[str, str, Recipe, Plan]]:
    """Label, bits, recipe and network of every row of a network."""
    bench = read_bench(NETWORKS)
    network = next(n for n in bench.networks if n.name == name)
    images, steps, unit_steps, _ = COUNTS[is_large(network.input_size)]
    shared = {"num_holdout": 0, "synthesis.num_images": images, "synthesis.steps": steps}
    learning = {"reconstruction.steps": unit_steps, "reconstruction.lr_rounding": 0.02}
    for label, all_bits in (("learned", LEARNED), ("nearest", NEAREST)):
        settings = {**shared, **learning, "synthesis.precision": "bfloat16"}
        entry = Entry(name="genie", label=label, images=False, placement=None, set=settings)
        bench = replace(bench, set={}, recipes=(entry,), budget="quick")
        plan = plan_network(bench, replace(network, bits=all_bits, set={}))
        for job in plan.jobs:
            recipe = job.settings if label == "learned" else replace(job.settings, reconstruction=None)
            yield label, job.cell[1], recipe, plan


def is_large(input_size: tuple[int, ...] | None) -> bool:
    return input_size is not None and input_size[1] > 64


def images_of(plan: Plan, settings: Recipe) -> dict[str, Any]:
    """Batches to quantize with, images to predict from, and the accuracy of the float network."""
    source = settings.synthesis
    assert isinstance(source, MadeInBatches)
    made: Batches = {}
    alone = Recipe(name="images", paper="", synthesis=source)
    synthesize_images(plan.teacher, recipe=alone, budget="paper", made=made, seed=0)
    held_out = synthesize_images(plan.teacher, recipe=alone, budget="paper", seed=1)
    return {"made": made, "held_out": held_out, "float": top1(plan.teacher.module, plan)}


def measured(plan: Plan, settings: Recipe, made: dict[str, Any]) -> dict[str, Any]:
    """What a row says: predictors, and the top-1 of both networks in percent."""
    run = quantize(plan.teacher, recipe=settings, budget="paper", made=made["made"], seed=0)
    teacher, images = plan.teacher.module, made["held_out"]
    graph = captured(plan.teacher, torch.device("cpu"))
    networks = attached(graph, settings, plan.teacher.spec, run.images)
    units = unit_signal_to_noise(networks.original, run.student, networks.units, images)
    found = predictors(teacher, run.student, images[:HELD_OUT], units)
    assert found is not None  # benchmarks are of classifiers
    return {
        "float": made["float"],
        "top1": top1(run.student, plan),
        "agreement": agreement(run.student, teacher, images[:HELD_OUT])["top1_agreement"],
        "predictors": asdict(found),
    }


def top1(model: torch.nn.Module, plan: Plan) -> float:
    limit = COUNTS[is_large(plan.network.input_size)][3]
    return accuracy(model, plan.dataset.batches(CHUNK, limit=limit)).top1


# ---- curves


def fitted(features: Array, drops: Array) -> Array:
    """Coefficients of 100 / (1 + exp(-z)), least sum of sqrt(error^2 + BEND^2), by damped Gauss-Newton."""
    terms = np.column_stack([np.ones(len(features)), features])
    penalty = RIDGE * np.diag([0.0] + [1.0] * (terms.shape[1] - 1))

    def cost(w: Array) -> float:
        errors = curve(terms, w) - drops
        return float(np.sqrt(errors**2 + BEND**2).sum() + w @ penalty @ w / 2)

    w = np.array([-2.0] + [0.0] * (terms.shape[1] - 1))
    damping, lowest = 1.0, cost(w)
    for _ in range(300):
        found = curve(terms, w)
        errors, slopes = found - drops, (found * (1 - found / 100))[:, None] * terms
        weights = 1 / np.sqrt(errors**2 + BEND**2)
        hessian = slopes.T @ (slopes * weights[:, None]) + penalty + damping * np.eye(len(w))
        step = np.linalg.solve(hessian, slopes.T @ (errors * weights) + penalty @ w)
        if cost(w - step) < lowest:
            w, lowest, damping = w - step, cost(w - step), max(damping / 3, 1e-6)
        else:
            damping = min(damping * 4, 1e6)
    return w


def curve(terms: Array, w: Array) -> Array:
    found: Array = 100 / (1 + np.exp(-np.clip(terms @ w, -50, 50)))
    return found


class Rows:
    """Rows as arrays.

    Args:
        rows: as `measure` wrote them.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)
        self.drops = np.array([row["float"] - row["top1"] for row in rows])
        self.networks = np.array([row["network"] for row in rows])
        self.predictors = [Predictors(**row["predictors"]) for row in rows]
        self.names = list(dict.fromkeys(self.networks.tolist()))

    def features(self, names: Sequence[str]) -> Array:
        return np.array([[feature(name, p) for name in names] for p in self.predictors])

    def without(self, network: str) -> "Rows":
        return Rows([row for row in self.rows if row["network"] != network])

    def only(self, network: str) -> "Rows":
        return Rows([row for row in self.rows if row["network"] == network])


Model = Callable[[Rows, Rows], Array]  # rows to fit to, rows to predict -> drops in points


def by_curve(names: Sequence[str]) -> Model:
    def model(known: Rows, asked: Rows) -> Array:
        terms = np.column_stack([np.ones(len(asked.rows)), asked.features(names)])
        return curve(terms, fitted(known.features(names), known.drops))

    return model


def as_it_is(_: Rows, asked: Rows) -> Array:
    """The disagreement on the images as they are: what agreement alone says."""
    return np.array([100 - row["agreement"] for row in asked.rows])


def affine(known: Rows, asked: Rows) -> Array:
    slope, constant = np.polyfit(as_it_is(known, known), known.drops, 1)
    found: Array = slope * as_it_is(known, asked) + constant
    return found


def bent(known: Rows, asked: Rows) -> Array:
    """A curve of the disagreement as it is, which is still agreement alone."""
    odds = [np.clip(as_it_is(known, rows) / 100, LEAST, 1 - LEAST) for rows in (known, asked)]
    terms = [np.log(share / (1 - share))[:, None] for share in odds]
    return curve(np.column_stack([np.ones(len(terms[1])), terms[1]]), fitted(terms[0], known.drops))


def chosen(known: Rows, asked: Rows) -> Array:
    """The candidate of the least error among the known networks; what a choice by eye would hide."""
    return by_curve(best(known))(known, asked)


def best(known: Rows) -> tuple[str, ...]:
    return min(CANDIDATES, key=lambda names: np.abs(left_out(known, by_curve(names)) - known.drops).mean())


def left_out(rows: Rows, model: Model) -> Array:
    """Every network predicted by a fit to the others."""
    found = np.zeros(len(rows.rows))
    for network in rows.names:
        found[rows.networks == network] = model(rows.without(network), rows.only(network))
    return found


def width(rows: Rows, model: Model) -> float:
    """Of the interval: the quantile of errors over their spread, each network predicted by the others."""
    found = left_out(rows, model)
    scores = np.abs(found - rows.drops) / np.array([spread(float(drop)) for drop in found])
    return float(np.quantile(scores, min(1.0, NOMINAL * (1 + 1 / len(scores)))))


def covered(rows: Rows, model: Model) -> tuple[float, float]:
    """Share in percent of the rows in the interval of the others, and the mean length of it in points."""
    inside, lengths = [], []
    for network in rows.names:
        known, asked = rows.without(network), rows.only(network)
        half = width(known, model)
        for drop, found in zip(asked.drops, model(known, asked), strict=True):
            reach = half * spread(max(float(found), 0.0))
            low, high = max(0.0, found - reach), min(100.0, found + reach)
            inside.append(low - 0.5 <= drop <= high)  # a drop just below 0 is none
            lengths.append(high - low)
    return 100 * float(np.mean(inside)), float(np.mean(lengths))


def fit(rows: Rows) -> Fit:
    names = best(rows)
    model = by_curve(names)
    errors = np.abs(left_out(rows, model) - rows.drops)
    return Fit(
        features=names,
        coefficients=tuple(round(float(c), 4) for c in fitted(rows.features(names), rows.drops)),
        width=round(width(rows, model), 3),
        error=round(float(errors.mean()), 2),
        error_of_small=round(float(errors[rows.drops < SMALL_DROP].mean()), 2),
        covered=round(covered(rows, model)[0], 1),
        networks=len(rows.names),
        rows=len(rows.rows),
    )


# ---- the table


def table(rows: Rows, found: Fit, command: str) -> str:
    """The report in Markdown."""
    interval, small = f"{100 * NOMINAL:.0f} % interval", f"of drops below {SMALL_DROP:.0f}"
    lines = [
        "# The drop in accuracy, estimated without data",
        "",
        "<!-- written by benchmarks/estimate.py -->",
        "",
        f"    {command}",
        "",
        f"{len(rows.rows)} rows of {len(rows.names)} networks; every figure is of networks that the fit did",
        f"not see. Points of top-1; the {interval} is set by the errors among the other networks. What",
        f"was measured has an error too: {COUNTS[False][3]} labelled images, {COUNTS[True][3]} of ImageNet.",
        "",
        f"| estimate | mean absolute error | {small} | worst network | in the {interval} | its mean length |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    models: list[tuple[str, Model]] = [
        ("disagreement as it is", as_it_is),
        ("disagreement as it is, affine", affine),
        ("disagreement as it is, curve", bent),
        *(
            (f"curve of {' and '.join(n.replace('_', ' ') for n in names)}", by_curve(names))
            for names in CANDIDATES
        ),
        ("the best of the curves on the other networks", chosen),
    ]
    for title, model in models:
        errors = np.abs(left_out(rows, model) - rows.drops)
        worst = max(float(errors[rows.networks == network].mean()) for network in rows.names)
        inside, length = covered(rows, model)
        small = errors[rows.drops < SMALL_DROP].mean()
        lines.append(
            f"| {title} | {errors.mean():.2f} | {small:.2f} | {worst:.1f} | {inside:.0f} % | {length:.1f} |"
        )
    lines += ["", f"Taken: {', '.join(found.features)}. `FIT` in `src/zsq/estimate.py`:", ""]
    lines += [f"    FIT = {found!r}", "", "By network, of the curve that was taken:", ""]
    lines += ["| network | float | rows | mean absolute error | largest |", "|---|---:|---:|---:|---:|"]
    errors = np.abs(left_out(rows, by_curve(found.features)) - rows.drops)
    for network in rows.names:
        own, accuracy_of = errors[rows.networks == network], rows.only(network).rows[0]["float"]
        lines.append(f"| {network} | {accuracy_of:.2f} | {len(own)} | {own.mean():.2f} | {own.max():.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("measure", "fit"))
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines")
    parser.add_argument("--write", type=Path, help="table of the fit")
    given = parser.parse_args(arguments)
    if given.command == "measure":
        measure(given.rows)
        return
    rows = Rows([json.loads(line) for line in given.rows.read_text().splitlines()])
    text = table(
        rows, fit(rows), "python benchmarks/estimate.py fit --rows benchmarks/results/estimate.jsonl"
    )
    print(text)
    if given.write is not None:
        given.write.write_text(text)


if __name__ == "__main__":
    main()
