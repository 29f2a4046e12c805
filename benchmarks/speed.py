"""Time, memory and work of zsq beside Genie as published: same network, seed and counts, taking turns.

    python benchmarks/speed.py digits
    python benchmarks/speed.py nets.py:factory --weights w.safetensors --input-size 3,32,32 --num-images 128

Variables of the environment are expanded in MODEL and --weights, so a command in single quotes can name them.

Both programs run in one process under the same settings of it and pause for each other every few steps, so
that whatever else the machine does meets both. What zsq is compared with is in published.py.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from work import added_memory, peak_copy, peak_macs
from yardstick import SIDES, Clocked, Precision, Yardstick

from zsq.allocator import keep_freed_memory


def peak_memory(arguments: Sequence[str], side: str, stage: str, precision: str) -> float:
    """MiB that a stage of one side adds to a process of its own, at its highest."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--alone", side, stage, precision],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure_alone(yardstick: Yardstick, side: str, stage: str, precision: Precision) -> float:
    """MiB that two steps of a stage add to this process."""
    return added_memory(lambda: yardstick.alone(side, stage, precision, 2), yardstick.device)


def row(stage: str, precision: str, clocked: dict[str, Clocked]) -> dict[str, Any]:
    """One row of the table, without memory and work."""
    result: dict[str, Any] = {"stage": stage, "precision": precision}
    key = "bn" if stage == "synthesis" else "reconstruction"
    for side in SIDES:
        losses = [values[key] for values in clocked[side].losses.values()]
        result[side] = {
            "seconds_a_step": clocked[side].seconds_a_step,
            "seconds": clocked[side].total,
            "loss": sum(losses) / max(1, len(losses)),
        }
    return result


def tables(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    names = "| stage | precision | published s/step | zsq s/step | ratio | published s | zsq s | ratio "
    lines = [
        names + "| published MiB | zsq MiB | published loss | zsq loss |",
        "|---|---|" + "---:|" * 10,
    ]
    for entry in report["rows"]:
        a, b = entry["published"], entry["zsq"]
        cells = [entry["stage"], entry["precision"]]
        for name in ("seconds_a_step", "seconds"):
            cells += [f"{a[name]:.4g}", f"{b[name]:.4g}", f"{a[name] / b[name]:.2f}"]
        cells += ["" if math.isnan(side["mib"]) else f"{side['mib']:.0f}" for side in (a, b)]
        cells += [f"{side['loss']:.4g}" for side in (a, b)]
        lines.append(f"| {' | '.join(cells)} |")
    peaks = report["peaks"]
    if peaks is None:
        return "\n".join(lines)
    known = ", ".join(f"{name} {value / 1e9:.4g} GMAC/s" for name, value in peaks["macs"].items())
    lines += [
        "",
        f"Measured peaks (the faster of a matrix product and a convolution): {known}; "
        f"copy {peaks['copy'] / 1e9:.4g} GB/s.",
        "",
        "| stage | program | precision | GMAC/step | GB/step | GMAC/s | of peak | GB/s | of copy |",
        "|---|---|---|" + "---:|" * 6,
    ]
    for entry in report["rows"]:
        for side in SIDES:
            values = entry[side]
            precision = entry["precision"] if side == "zsq" else "float32"
            macs, moved = (values[key] / values["seconds_a_step"] / 1e9 for key in ("macs", "moved"))
            lines.append(
                f"| {entry['stage']} | {side} | {precision} | {values['macs'] / 1e9:.4g} | "
                f"{values['moved'] / 1e9:.4g} | {macs:.4g} | {macs * 1e9 / peaks['macs'][precision]:.0%} | "
                f"{moved:.4g} | {moved * 1e9 / peaks['copy']:.0%} |"
            )
    return "\n".join(lines)


def section(report: dict[str, Any]) -> str:
    """The tables under a heading, with what they were measured with."""
    steps, kept = report["steps"], report["kept_freed_memory"]
    batch = min(report["batch_size"], report["images"])
    facts = (
        f"{report['images']} images, {steps['synthesis']} steps a batch of {batch}, "
        f"{steps['reconstruction']} steps a unit, {report['bits']}, {report['device']}, "
        f"{report['threads']} thread{'' if report['threads'] == 1 else 's'}, torch {report['torch']}, "
        f"freed memory {'kept' if kept else 'returned'}."
    )
    return f"## {report['network']}\n\n`{report['command']}`\n\n{facts}\n\n{tables(report)}"


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Everything that the tables show."""
    yardstick = Yardstick(options)
    precisions = options.precision.split(",")
    rows, images = [], None
    for precision in precisions:
        clocked, images = yardstick.race_images(precision)
        rows.append(row("synthesis", precision, clocked))
    assert images is not None
    rows += [
        row("reconstruction", precision, yardstick.race_units(images, precision)) for precision in precisions
    ]
    for entry in rows:
        for side in SIDES:
            which = side, entry["stage"], entry["precision"]
            if not options.no_work:
                entry[side].update(asdict(yardstick.work(*which)))
            entry[side]["mib"] = math.nan if options.no_memory else peak_memory(arguments, *which)
    used = {"float32", *precisions}
    return {
        "command": shlex.join(["python", "benchmarks/speed.py", *arguments]),
        "network": yardstick.teacher.name.rpartition("/")[2].rpartition(":")[2],
        "images": options.num_images,
        "batch_size": options.batch_size,
        "steps": {"synthesis": yardstick.images.steps, "reconstruction": yardstick.learning.steps},
        "bits": options.bits,
        "device": str(yardstick.device),
        "threads": torch.get_num_threads(),
        "kept_freed_memory": not options.plain_allocator,
        "torch": torch.__version__,
        "rows": rows,
        "peaks": None
        if options.no_work
        else {
            "macs": {name: peak_macs(getattr(torch, name), yardstick.device) for name in sorted(used)},
            "copy": peak_copy(yardstick.device),
        },
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", help="as for `zsq quantize`")
    parser.add_argument("--weights", help="a file")
    parser.add_argument("--input-size", help="C,H,W; H and W multiples of 4")
    parser.add_argument("--mean", help="one number a channel")
    parser.add_argument("--std", help="one number a channel")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128, help="images that are made together")
    parser.add_argument("--steps", type=int, default=100, help="of a batch of images")
    parser.add_argument("--reconstruction-steps", type=int, help="of a unit; as --steps if left out")
    parser.add_argument("--bits", default="W4A4")
    parser.add_argument("--precision", default="float32,bfloat16", help="of zsq's layers; one or several")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch, for both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain-allocator", action="store_true", help="do not keep freed memory")
    parser.add_argument("--no-memory", action="store_true", help="do not start processes to measure memory")
    parser.add_argument("--no-work", action="store_true", help="do not count operations and bytes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add the tables to a Markdown file")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.model, options.weights = (v and os.path.expandvars(v) for v in (options.model, options.weights))
    return options


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    options = parse(arguments)
    if not options.plain_allocator:
        keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.alone:
        print(measure_alone(Yardstick(options), *options.alone))
        return
    report = measure(options, arguments)
    print(section(report))
    if options.append:
        with options.append.open("a", encoding="utf-8") as file:
            file.write(f"\n{section(report)}\n")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
