"""The head of a report: bits, size, cost, what was measured and, apart from it, what was only estimated."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsq.amounts import bytes_text, drop_error_text, drop_text, seconds_text
from zsq.health import Finding
from zsq.report.charts import share_bar
from zsq.run import Run

PARTS = {
    "codes": "weight codes",
    "quantizers": "scales and zero points",
    "float": "float tensors",
    "header": "graph",
}


@dataclass(frozen=True)
class Accuracy:
    """Measured accuracy of a network, as texts."""

    who: str
    top1: str
    top5: str
    num_images: str


@dataclass(frozen=True)
class Headline:
    """What a run came to.

    Attributes:
        title: network and bits.
        facts: pairs of a word and its value, in small print.
        tiles: (title, value, remark).
        measured: on real labelled images; empty if none were given.
        data: where those were from.
        loss: what it cost, "−1.25 points" of top-1; "" if the teacher was not measured.
        estimated: (title, value, remark): without data, on synthetic images.
        estimated_on: the images, in words.
        cost: stacked bar of the seconds by stage.
        size: stacked bar of the bytes.
        command: that made it; "" if it was made in Python.
        notes: what was assumed when the model was loaded.
        findings: what is wrong with the numbers, a sentence each.
        figures: numbers to compare runs by.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    tiles: tuple[tuple[str, str, str], ...]
    measured: tuple[Accuracy, ...]
    data: str
    loss: str
    estimated: tuple[tuple[str, str, str], ...]
    estimated_on: str
    cost: str
    size: str
    command: str
    notes: tuple[str, ...]
    findings: tuple[str, ...]
    figures: Mapping[str, float | None]


def headline(run: Run) -> Headline:
    """The head of a run's report, from its record.

    Raises:
        KeyError, TypeError, ValueError: the record is damaged.
    """
    record = run.record
    results, model, recipe = record["results"], record["model"], record["recipe"]
    scheme, size = recipe["scheme"], results["size"]
    before, after = int(size["teacher_bytes"]), int(size["student_bytes"])
    ratio = before / max(after, 1)
    timings = {str(stage): float(seconds) for stage, seconds in record["timings"].items()}
    seconds = sum(timings.values())
    measured, data, figures = _measured(results["measured"])
    estimated, on, estimates = _estimated(results)
    ends = "first and last layer 8 bits" if scheme["ends"] == "8bit" else "the same at both ends"
    placed = "placed for engines" if scheme.get("placement") == "engine" else ""
    versions = record["versions"]
    parts = [
        (PARTS.get(key, key), float(count), bytes_text(count)) for key, count in size["student_parts"].items()
    ]
    top1 = {who: values["top1"] for who, values in results["measured"].items() if isinstance(values, dict)}
    loss = f"{top1['student'] - top1['teacher']:+.2f} points" if len(top1) == 2 else ""
    return Headline(
        title=f"{model['name']}, {record['bits']}",
        facts=(
            ("recipe", str(recipe["name"])),
            ("budget", str(record.get("budget", "not recorded"))),
            ("seed", str(int(record["seed"]))),
            ("images", f"{len(run.images):,} of {'×'.join(map(str, run.images.shape[1:]))}"),
            ("parameters", f"{int(model['parameters']):,}"),
            ("device", str(record["device"])),
            ("zsq", str(versions["zsq"])),
            ("torch", str(versions["torch"])),
            ("paper", str(recipe.get("paper", ""))),
        ),
        tiles=(
            ("Bits", str(record["bits"]), "; ".join(text for text in (ends, placed) if text)),
            ("Size on disk", bytes_text(after), f"from {bytes_text(before)}, {ratio:.1f} times smaller"),
            ("Cost", seconds_text(seconds), f"on {record['device']}, all stages"),
        ),
        measured=measured,
        data=data,
        loss=loss.replace("-", "−"),
        estimated=estimated,
        estimated_on=on,
        cost=share_bar(
            [(stage, value, seconds_text(value)) for stage, value in timings.items() if value >= 0.0005]
        ),
        size=share_bar(parts),
        command=str(record.get("command") or ""),
        notes=tuple(map(str, model["source"].get("notes", ()))),
        findings=tuple(str(Finding(**found)) for found in results.get("findings", ())),
        figures={
            **figures,
            **estimates,
            "size on disk, kB": after / 1000,
            "times smaller": ratio,
            "time, s": seconds,
        },
    )


def _measured(measured: Mapping[str, Any]) -> tuple[tuple[Accuracy, ...], str, dict[str, float | None]]:
    rows: list[Accuracy] = []
    figures: dict[str, float | None] = {}
    data = Path(str(measured.get("data", ""))).name
    for who, title in (("teacher", "Teacher, before"), ("student", "Student, after")):
        values = measured.get(who)
        if values is not None:
            top5 = "" if values["top5"] is None else f"{values['top5']:.2f} %"
            count = int(values["num_images"])
            rows.append(Accuracy(title, f"{values['top1']:.2f} %", top5, f"{count:,}"))
            figures[f"measured: {who}'s top-1 on {count:,} images of {data}, %"] = float(values["top1"])
    return tuple(rows), data, figures


def _estimated(
    results: Mapping[str, Any],
) -> tuple[tuple[tuple[str, str, str], ...], str, dict[str, float | None]]:
    estimates = results["estimated_without_data"]
    held_out = "holdout" in estimates
    about = estimates["holdout"] if held_out else estimates.get("calibration_images")
    if about is None:
        return (), "", {}
    count = int(about["num_images"])
    kind = "held-out synthetic images" if held_out else "images it was calibrated on (optimistic)"
    rows: list[tuple[str, str, str]] = []
    figures: dict[str, float | None] = {}
    if "top1_agreement" in about:
        agreement = float(about["top1_agreement"])
        rows.append(("Agreement with the teacher", f"{agreement:.1f} %", "same class; not an accuracy"))
        figures[f"estimated: agreement on {kind}, %"] = agreement
    drop = estimates.get("drop")
    if held_out and drop is not None:
        rows.append(("Estimated drop of top-1", drop_text(drop), drop_error_text(drop)))
        figures["estimated: drop of top-1, points"] = float(drop["points"])
    snr = float(about["snr"])
    rows.append(("Signal to noise", f"{snr:.1f} dB", "of the outputs; higher is better"))
    figures[f"estimated: signal to noise on {kind}, dB"] = snr
    return tuple(rows), f"{count:,} {kind}", figures
