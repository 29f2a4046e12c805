"""Plots of benchmark rows: accuracy against what it cost, and sharpness against accuracy; correlations.

    python benchmarks/plots.py runs/bench-w2a2/rows.jsonl runs/bench-sadag_quick/rows.jsonl \
        --network cifar10_resnet20 cifar10_wrn16_1 --cost docs/cost.svg --sharpness docs/sharpness.svg

Each file of rows is one budget, each network has axes of its own. Cost is the time of synthesis, refinement
and reconstruction of a row; images are made once for all bits and count in full for each. Sharpness is that
of the student's reconstruction loss on real labelled images relative to the loss, see `zsq.diagnose`; rows
without diagnostics are left out there. Of rows of one cell the last one counts. `--correlations` prints how
top-1 goes with sharpness, with the loss itself and with the alignment of mean gradients.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

STAGES = ("synthesize", "refine", "reconstruct")
Row = dict[str, Any]


def read_rows(path: Path, bits: Sequence[str] | None, recipes: Sequence[str] | None) -> list[Row]:
    """Finished rows, of these bits and recipes if they are named."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = {(row["network"], row["recipe"], row["bits"], row["seed"]): row for row in found}
    return [
        row
        for row in last.values()
        if (bits is None or row["bits"] in bits) and (recipes is None or row["recipe"] in recipes)
    ]


def cost(row: Row) -> float | None:
    """Seconds of what counts; None where an interruption hid some of them."""
    seconds = [row["seconds"].get(stage, 0.0) for stage in STAGES]
    return None if None in seconds else sum(seconds)


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by recipe and bits, in order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["recipe"], row["bits"]), []).append(row)
    return found


def draw_cost(budgets: Sequence[list[Row]], axes: Axes) -> None:
    """A line for each recipe and bits, through the budgets: mean and deviation over seeds."""
    lines: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for rows in budgets:
        for key, members in groups(rows).items():
            known = [seconds for seconds in map(cost, members) if seconds is not None]
            if known:
                top1 = [row["top1"] for row in members]
                spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
                lines.setdefault(key, []).append((statistics.fmean(known), statistics.fmean(top1), spread))
    for (recipe, bits), points in lines.items():
        x, y, spread = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, spread, marker="o", capsize=3, label=f"{recipe}, {bits}")
    axes.set(
        xlabel="seconds of synthesis, refinement and reconstruction", ylabel="top-1, percent", xscale="log"
    )


def draw_sharpness(rows: Sequence[Row], axes: Axes) -> None:
    """A point for each row."""
    for (recipe, bits), members in groups([row for row in rows if "diagnostics" in row]).items():
        on_real = [row["diagnostics"]["others"] for row in members]
        x = [found["sharpness"] / found["loss"] for found in on_real]
        axes.scatter(x, [row["top1"] for row in members], label=f"{recipe}, {bits}")
    axes.set(xlabel="sharpness on real images, relative to the loss", ylabel="top-1, percent")


def correlations(rows: Sequence[Row]) -> str:
    """Pearson's, of each network and bits, between top-1 and figures on real images; Markdown."""
    lines = [
        "| network | bits | rows | sharpness / loss | loss | alignment of means |",
        "|---|---|---:|---:|---:|---:|",
    ]
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "diagnostics" in row:
            cells.setdefault((row["network"], row["bits"]), []).append(row)
    for (network, bits), members in cells.items():
        found = [row["diagnostics"] for row in members]
        figures = (
            [d["others"]["sharpness"] / d["others"]["loss"] for d in found],
            [d["others"]["loss"] for d in found],
            [d["alignment"]["of_means"] for d in found],
        )
        top1 = [row["top1"] for row in members]
        texts = [f"{statistics.correlation(figure, top1):.2f}" for figure in figures]
        lines.append(f"| {network} | {bits} | {len(members)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path, help="rows.jsonl of one benchmark or several")
    parser.add_argument("--network", required=True, nargs="+", help="their names in the benchmark")
    parser.add_argument("--bits", nargs="+", help="leave out other rows")
    parser.add_argument("--recipe", nargs="+", help="leave out other rows")
    parser.add_argument("--cost", type=Path, metavar="FILE", help=".svg or .png")
    parser.add_argument("--sharpness", type=Path, metavar="FILE", help=".svg or .png")
    parser.add_argument("--correlations", action="store_true", help="print a table")
    options = parser.parse_args(arguments)
    budgets = [read_rows(path, options.bits, options.recipe) for path in options.rows]
    if options.correlations:
        print(correlations([row for rows in budgets for row in rows if row["network"] in options.network]))
    for path, draw in (
        (options.cost, draw_cost),
        (
            options.sharpness,
            lambda budgets, axes: draw_sharpness([r for rows in budgets for r in rows], axes),
        ),
    ):
        if path is not None:
            figure = Figure(figsize=(1.0 + 4.2 * len(options.network), 4.0), layout="constrained")
            for network, axes in zip(
                options.network, figure.subplots(1, len(options.network), squeeze=False)[0], strict=True
            ):
                draw([[row for row in rows if row["network"] == network] for rows in budgets], axes)
                axes.grid(alpha=0.3)
                axes.legend()
                axes.set_title(network)
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main(sys.argv[1:])
