"""What finished commands say: tables and what to do next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from zsq.amounts import bytes_text, drop_error_text, drop_text, seconds_text
from zsq.cli.terminal import grid


def evaluate_line(folder: Path, data: str | None) -> str:
    """The command that measures a run."""
    return f"zsq evaluate {shlex.quote(str(folder))} --data {'PATH' if data is None else shlex.quote(data)}"


def quantized_summary(record: Mapping[str, Any], folder: Path, data: str | None) -> list[Table | str]:
    """What a finished run came to: bits and sizes, what is estimated, what was measured, and what next."""
    results, size = record["results"], record["results"]["size"]
    before, after = size["teacher_bytes"], size["student_bytes"]
    scheme = record["recipe"]["scheme"]
    ends = ", first and last layer 8 bits" if scheme["ends"] == "8bit" else ""
    ends += ", placed for engines" if scheme.get("placement") == "engine" else ""
    rows = [
        ("bits", "float32", record["bits"] + ends),
        ("size on disk", bytes_text(before), f"{bytes_text(after)}, {before / after:.1f} times smaller"),
    ]
    times = ", ".join(f"{stage} {seconds_text(value)}" for stage, value in record["timings"].items())
    return [
        "",
        f"{record['model']['name']}, recipe {record['recipe']['name']}, seed {record['seed']}",
        grid(("", "before", "after"), rows),
        *_estimated(results["estimated_without_data"]),
        *_findings(results.get("findings", ())),
        *(measured_summary(results["measured"]) if results["measured"] else ()),
        "",
        f"Time: {times}",
        f"Files: {folder} (student.safetensors, images.safetensors, images.png, run.json, metrics.jsonl, "
        "inspection.json)",
        f"To look at it: zsq report {shlex.quote(str(folder))}",
        f"To measure accuracy on labelled images: {evaluate_line(folder, data)}",
        f"To use it in Python: zsq.load_run({str(folder)!r}).student",
    ]


def _estimated(estimates: Mapping[str, Any]) -> list[Table | str]:
    if "holdout" in estimates:
        about, heading, images = estimates["holdout"], "estimated without data", "held-out synthetic images"
    else:
        about, heading = (
            estimates["calibration_images"],
            "estimated on the images it was calibrated on (optimistic)",
        )
        images = "calibration images"
    row = (f"{about['top1_agreement']:.1f} %", f"{about['snr']:.1f} dB", f"{about['num_images']} {images}")
    drop = estimates.get("drop")
    told = (
        [] if drop is None else ["", f"Estimated drop of top-1: {drop_text(drop)}, {drop_error_text(drop)}"]
    )
    return ["", heading, grid(("agreement with the teacher", "signal to noise", "on"), [row]), *told]


def _findings(found: Sequence[Mapping[str, str]]) -> list[Table | str]:
    """What is wrong with the numbers, if anything is."""
    if not found:
        return []
    rows = [(one["stage"], one["layer"], f"{one['what']}; {one['done']}") for one in found]
    return ["", "findings", grid(("stage", "where", "what"), rows)]


def diagnostics_summary(found: Mapping[str, Any]) -> list[Table | str]:
    """Figures of `Diagnostics` in two columns: the images that the student was made with, and others."""
    own, others, both = found["own"], found["others"], found["generalisation"]
    rows = [
        ("reconstruction loss", own["loss"], others["loss"]),
        ("rise after a step uphill", own["sharpness"], others["sharpness"]),
        ("largest eigenvalue of its Hessian", own["eigenvalue"], others["eigenvalue"]),
        ("gradient norm", both["gradient_norm"], both["other_gradient_norm"]),
        ("images", own["num_images"], others["num_images"]),
    ]
    texts = [(name, f"{here:.4g}", f"{there:.4g}") for name, here, there in rows]
    cosines = found["alignment"]
    return [
        "",
        "diagnostics of the student (none of them is an accuracy)",
        grid(("", "on its own images", "on the given images"), texts, right=(1, 2)),
        f"Cosines of their gradients: {cosines['of_means']:.3f} between the means, {cosines['pairwise']:.3f} "
        f"over pairs, {cosines['nearest']:.3f} with the nearest",
    ]


def measured_summary(measured: Mapping[str, Any]) -> list[Table | str]:
    """Accuracies on real labelled images: {"data": path, "teacher": {...}, "student": {...}}."""
    rows = [
        (
            "teacher (before)" if who == "teacher" else "student (after)",
            f"{values['top1']:.2f} %",
            "" if values["top5"] is None else f"{values['top5']:.2f} %",
            str(values["num_images"]),
        )
        for who, values in ((who, measured.get(who)) for who in ("teacher", "student"))
        if values is not None
    ]
    table = grid(("", "top-1 accuracy", "top-5 accuracy", "images"), rows, right=(1, 2, 3))
    return ["", f"measured on {measured['data']}", table]
