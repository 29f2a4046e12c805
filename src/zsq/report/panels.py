"""What a report shows of one run, section by section: a sentence and what is drawn below it."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from PIL import Image

from zsq.images.contact_sheet import picture, pixels_of
from zsq.inspection import MARGIN
from zsq.quant.affine import integer_limits
from zsq.recover.losses import MAX_DECIBELS
from zsq.report.charts import FEW_LEVELS, Histogram, Row, Series, dot_rows, histogram, line_chart
from zsq.report.placement import Step
from zsq.run import Run

NOT_RECORDED = "Not recorded: this run was made before zsq kept it. Quantizing again records it."
LARGEST = 64  # pixels of a thumbnail's side
HIDDEN = ("lr", "snr")  # what logged values that are no losses begin with
MAX_LOSSES = 6  # curves of a stage


@dataclass(frozen=True)
class Panel:
    """A run's part of a section.

    Attributes:
        summary: what is to be seen, in a sentence.
        kind: which form of the template shows `data`; "" for the sentence alone.
        data: for that form.
    """

    summary: str
    kind: str = ""
    data: Any = None


@dataclass(frozen=True)
class Tile:
    """An image with what the two networks take it for; texts are empty without classes."""

    source: str
    teacher: str
    student: str
    same: bool
    about: str


def images(run: Run) -> Panel:
    """The first images, with the teacher's and the student's class."""
    if len(run.images) == 0:
        return Panel("The run holds no images: those that were given to it were not published.")
    shown = (run.inspection or {}).get("num_images", 64)
    pixels = pixels_of(run.images[: int(shown)], run.spec)
    classes = (run.inspection or {}).get("classes")
    tiles, same = [], 0
    origin = "label" if run.record.get("given_labels_sha256") else "made for class"
    for k, one in enumerate(pixels):
        source = _data_uri(picture(one))
        if classes is None:
            tiles.append(Tile(source, "", "", True, f"image {k}"))
            continue
        (a, p), (b, q) = (
            (int(classes[who]["class"][k]), classes[who]["probability"][k]) for who in ("teacher", "student")
        )
        asked = "" if run.labels is None else f", {origin} {int(run.labels[k])}"
        about = f"image {k}: teacher {a} ({_share(p)}), student {b} ({_share(q)}){asked}"
        tiles.append(Tile(source, f"{a} · {_share(p)}", f"{b} · {_share(q)}", a == b, about))
        same += a == b
    count = f"The first {len(tiles)} of {len(run.images)} images"
    if run.inspection is None:
        return Panel(f"{count}. Their classes: not recorded in this run.", "tiles", tiles)
    if classes is None:
        return Panel(f"{count}. The network names no classes.", "tiles", tiles)
    return Panel(f"{count}; of {same} of them both networks name the same class.", "tiles", tiles)


def batch_norm(run: Run) -> Panel:
    """How well the images meet the teacher's BatchNorm statistics."""
    if run.inspection is None:
        return Panel(NOT_RECORDED)
    layers = run.inspection["batch_norm"]
    if not layers:
        return Panel("The network has no BatchNorm with stored statistics.")
    rows = [
        Row(
            str(layer["name"]),
            ((0, _finite(layer["mean_gap"])), (1, _finite(layer["deviation_gap"]))),
            f"{_short(layer['mean_gap'])} / {_short(layer['deviation_gap'])}",
        )
        for layer in layers
    ]
    worst = max(layers, key=lambda layer: layer["mean_gap"] or 0)
    summary = (
        f"Largest gap of the mean: {_short(worst['mean_gap'])} deviations in {worst['name']}; over all "
        f"{len(layers)} layers {_short(fmean(layer['mean_gap'] or 0 for layer in layers))} on average."
    )
    labels = ("mean", "deviation")
    return Panel(
        summary,
        "chart",
        dot_rows(rows, labels=labels, unit="in stored deviations, root mean square over channels"),
    )


def units(run: Run) -> Panel:
    """Signal-to-noise of each unit before and after learning, and on images that nothing was learned on."""
    results = run.record["results"]
    unseen = results["estimated_without_data"].get("unit_snr", {})
    rows, gains = [], []
    for unit in results["units"]:
        before, after = decibels(unit["snr_nearest"]), decibels(unit["snr"])
        held = decibels(unseen.get(unit["name"]))
        gain = None if before is None or after is None else after - before
        gains += [] if gain is None else [gain]
        text = "no error" if after is None else f"{after:.1f} dB"
        text += "" if not gain else f" ({gain:+.1f})".replace("-", "−")
        rows.append(Row(str(unit["name"]), ((0, before), (1, after), (2, held)), text, joined=True))
    finite = [unit for unit in results["units"] if decibels(unit["snr"]) is not None]
    if not finite:
        return Panel("Every unit returns what the teacher's returns.")
    lowest = min(finite, key=lambda unit: float(unit["snr"]))
    summary = f"Most noise: {lowest['name']}, {lowest['snr']:.1f} dB. "
    if any(gain for gain in gains):
        better = sum(gain > 0 for gain in gains)
        summary += (
            f"Learning raised {better} of {len(rows)} units; over all by {fmean(gains):.1f} dB on average."
        )
    else:
        summary += "Nothing was learned unit by unit."
    labels = ("rounded to nearest", "after reconstruction", "whole network, held-out images")
    return Panel(summary, "chart", dot_rows(rows, labels=labels, unit="dB, higher is better", zero=False))


def weights(run: Run, steps: Sequence[Step]) -> Panel:
    """Float weights on the grid of the codes that are stored for them."""
    if run.inspection is None:
        return Panel(NOT_RECORDED)
    names = {step.weight_quantizer: step.name for step in steps}
    plots = []
    for quantizer, about in run.inspection["weights"].items():
        integer_limits(about["bits"], signed=False)
        levels = 2 ** int(about["bits"])
        name = names.get(quantizer, quantizer)
        lines = range(levels) if levels <= FEW_LEVELS else ()
        chart = Histogram(about["histogram"], -0.5, levels - 0.5, lines, about["codes"])
        count = sum(about["codes"])
        outside = (about["below"] + about["above"]) / max(count, 1)
        note = f"{about['bits']} bits, {count:,} weights"
        note += f", {_share(outside)} beyond the grid" if outside else ""
        plots.append((name, histogram(chart, about=f"weights of {name}"), note))
    return Panel(f"{len(plots)} layers; each channel's weights are counted in its own steps.", "plots", plots)


def activations(run: Run, steps: Sequence[Step]) -> Panel:
    """What arrives at the activation quantizers, with their levels."""
    if run.inspection is None:
        return Panel(NOT_RECORDED)
    readers: dict[str, list[str]] = {}
    for step in steps:
        for quantizer in step.quantizers:
            readers.setdefault(quantizer, []).append(step.name)
    found = run.inspection["activations"]
    if not found:
        return Panel("Activations are not quantized.")
    plots, worst = [], ("", 0.0)
    for quantizer, about in found.items():
        integer_limits(about["bits"], signed=False)
        levels = [(code - about["zero_point"]) * about["scale"] for code in range(2 ** int(about["bits"]))]
        chart = Histogram(about["histogram"], about["low"], about["high"], levels, rare=True)
        name = ", ".join(readers.get(quantizer, [quantizer]))
        clipped = about["clipped"] or 0.0
        worst = max(worst, (name, clipped), key=lambda pair: pair[1])
        ends = [_short(levels[0]), _short(levels[-1])]
        note = f"{about['bits']} bits, {ends[0]} … {ends[1]}, clipped {_share(clipped)}"
        plots.append((f"into {name}", histogram(chart, about=f"activations into {name}"), note))
    summary = (
        f"{len(plots)} quantized tensors; most is clipped into {worst[0]}: {_share(worst[1])} of the values."
    )
    if not worst[1]:
        summary = f"{len(plots)} quantized tensors, none of which clips anything."
    return Panel(f"{summary} Plots go {MARGIN:.1%} of the range beyond it.", "plots", plots)


def rounding(run: Run, steps: Sequence[Step]) -> Panel:
    """How many weights are stored as another code than the nearest."""
    if run.inspection is None:
        return Panel(NOT_RECORDED)
    names = {step.weight_quantizer: step.name for step in steps}
    layers = run.inspection["weights"]
    counts = {name: sum(about["codes"]) for name, about in layers.items()}
    changed = {name: (about["changed"] or 0.0) for name, about in layers.items()}
    share = sum(changed[n] * counts[n] for n in layers) / max(sum(counts.values()), 1)
    if share == 0:
        return Panel("No rounding was learned: every weight is stored as the nearest code.")
    most = max(changed, key=lambda name: changed[name])
    rows = [Row(names.get(n, n), ((0, 100 * changed[n]),), _share(changed[n])) for n in layers]
    summary = f"{_share(share)} of all weights; most in {names.get(most, most)}: {_share(changed[most])}."
    return Panel(summary, "chart", dot_rows(rows, labels=("weights whose code changed",), unit="%"))


def losses(run: Run) -> Panel:
    """The logged losses of every stage."""
    stages: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for line in run.metrics:
        for key, value in line.items():
            if key in ("stage", "item", "done") or key.startswith(HIDDEN) or value is None:
                continue
            if math.isfinite(float(value)):
                curves = stages.setdefault(str(line["stage"]), {}).setdefault(key, {})
                curves.setdefault(str(line["item"]), []).append((float(line["done"]), float(value)))
    if not stages:
        return Panel("Nothing was optimised, or no step was logged.")
    plots = []
    for stage, by_key in stages.items():
        series = [Series(key, list(items.values())) for key, items in list(by_key.items())[:MAX_LOSSES]]
        parts = len(next(iter(by_key.values())))
        note = f"{parts} parts, one after another" if parts > 1 else ""
        plots.append((stage, line_chart(series, about=f"losses of {stage} over steps"), note))
    names = ", ".join(f"{stage} ({len(next(iter(by_key.values())))})" for stage, by_key in stages.items())
    return Panel(f"Stages with their batches, units or parts: {names}.", "charts", plots)


def _data_uri(image: Image.Image) -> str:
    if max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST))
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def decibels(value: Any) -> float | None:
    """None for what is not there and for no error at all."""
    return None if value is None or abs(float(value)) >= MAX_DECIBELS else float(value)


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _short(value: float | None) -> str:
    if value is None:
        return "not finite"
    return (f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}").replace("-", "−")


def _share(value: float | None) -> str:
    """0.0123 -> "1.2 %"."""
    if value is None:
        return "?"
    digits = ".0f" if value == 0 or value >= 0.0995 else ".2g"
    return f"{100 * value:{digits}}\N{NO-BREAK SPACE}%"
