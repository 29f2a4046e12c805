r"""Processor time to the same accuracy: Genie as published at its counts beside zsq at smaller ones.

    python benchmarks/to_accuracy.py 'nets.py:cifar100_resnet20s' --weights w.safetensors \
        --input-size 3,32,32 --mean ... --std ... --data test.npz --rows rows.jsonl --write to_accuracy.md

Both do all of their work: published.py with --published (images, steps a batch, steps a unit), zsq with
--ours at the rates of its quick budget; then both students are measured on the labelled images, which
nothing before that has seen. The two take turns, stage by stage, in one process with one thread. Time is
that of the processor, so that other work on the machine matters little; images are made once for all bits
and count in full for each.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yardstick import Yardstick, exhaust

import zsq
from zsq.allocator import keep_freed_memory
from zsq.data import open_dataset
from zsq.evaluate import accuracy
from zsq.images.batches import batch_sizes
from zsq.recipe_images import Batches

SIDES = ("published", "zsq")


def clocked(program: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a program, and what it returned."""
    started = time.process_time()
    result = program()
    return time.process_time() - started, result


def counts_of(text: str) -> tuple[int, int, int]:
    """Images, steps a batch, steps a unit."""
    images, steps, unit_steps = (int(part) for part in text.split(","))
    return images, steps, unit_steps


class Published:
    """Genie as published, with its counts."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options = options
        self.images, self.steps, self.unit_steps = counts_of(options.published)
        self.seed = seed

    def _yardstick(self, bits: str) -> Yardstick:
        values = vars(self.options) | {
            "bits": bits,
            "seed": self.seed,
            "num_images": self.images,
            "batch_size": 128,
            "steps": self.steps,
            "reconstruction_steps": self.unit_steps,
            "device": "cpu",
        }
        return Yardstick(argparse.Namespace(**values))

    def make(self) -> Tensor:
        """All images."""
        yardstick, made = self._yardstick("W4A4"), list[Tensor]()
        for index in range(len(batch_sizes(self.images, yardstick.images.batch_size))):
            exhaust(yardstick.published_batch(yardstick.images, index, made))
        return torch.cat(made)

    def learn(self, images: Tensor, bits: str) -> nn.Module:
        """The student."""
        yardstick = self._yardstick(bits)
        student, loops = yardstick.published_student(images, yardstick.learning)
        for unit in yardstick.units:
            exhaust(loops(unit.name))
        return student


class Ours:
    """zsq at the quick budget, with its counts."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        size = tuple(int(v) for v in options.input_size.split(","))
        mean, std = (tuple(map(float, v.split(","))) for v in (options.mean, options.std))
        self.teacher = zsq.load_model(
            options.model, weights=options.weights, input_size=size, mean=mean, std=std
        )
        images, steps, unit_steps = counts_of(options.ours)
        self.seed = seed
        self.settings = {
            "synthesis.num_images": images,
            "synthesis.steps": steps,
            "synthesis.precision": options.precision,
            "reconstruction.steps": unit_steps,
            "num_holdout": 0,
        }

    def make(self) -> Batches:
        """All images, as finished batches."""
        made: Batches = {}
        zsq.synthesize_images(
            self.teacher, recipe="genie", budget="quick", overrides=self.settings, made=made, seed=self.seed
        )
        return made

    def learn(self, made: Batches, bits: str) -> nn.Module:
        """The student."""
        return zsq.quantize(
            self.teacher,
            recipe="genie",
            bits=bits,
            budget="quick",
            overrides=self.settings,
            made=made,
            seed=self.seed,
        ).student


def one_seed(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Seconds and accuracies of both sides."""
    ours = Ours(options, seed)
    sides: dict[str, Published | Ours] = {"published": Published(options, seed), "zsq": ours}
    dataset = open_dataset(options.data, ours.teacher.spec)
    row: dict[str, Any] = {"seed": seed, "synthesis": {}, "reconstruction": {}, "top1": {}}
    images = {}
    for side, program in sides.items():
        row["synthesis"][side], images[side] = clocked(program.make)
    for bits in options.bits.split(","):
        row["reconstruction"][bits], row["top1"][bits] = {}, {}
        for side, program in sides.items():
            seconds, student = clocked(lambda p=program, s=side, b=bits: p.learn(images[s], b))  # type: ignore[misc]
            row["reconstruction"][bits][side] = seconds
            row["top1"][bits][side] = accuracy(student, dataset.batches(256)).to_json()["top1"]
    return row


def table(rows: Sequence[dict[str, Any]], bits: Sequence[str]) -> str:
    """The report in Markdown: medians of seconds and ratios, means of accuracies."""
    lines = [
        "| bits | published top-1 | zsq top-1 | published s | zsq s | ratio |",
        "|---|" + "---:|" * 5,
    ]
    for name in bits:
        totals = [
            {side: row["synthesis"][side] + row["reconstruction"][name][side] for side in SIDES}
            for row in rows
        ]
        top1 = [statistics.fmean(row["top1"][name][side] for row in rows) for side in SIDES]
        seconds = [statistics.median(total[side] for total in totals) for side in SIDES]
        ratio = statistics.median(total["published"] / total["zsq"] for total in totals)
        lines.append(
            f"| {name} | {top1[0]:.2f} | {top1[1]:.2f} | {seconds[0]:.0f} | {seconds[1]:.0f} | {ratio:.1f} |"
        )
    parts = {
        stage: statistics.median(value)
        for stage, value in {
            "synthesis": [row["synthesis"]["published"] / row["synthesis"]["zsq"] for row in rows],
            "reconstruction": [
                row["reconstruction"][name]["published"] / row["reconstruction"][name]["zsq"]
                for row in rows
                for name in bits
            ],
        }.items()
    }
    lines += ["", f"By stage: {', '.join(f'{stage} {ratio:.1f}' for stage, ratio in parts.items())} times."]
    seeds = ", ".join(str(row["seed"]) for row in rows)
    return "\n".join([*lines, "", f"Seeds {seeds}: means of accuracies, medians of seconds and ratios."])


def main(arguments: Sequence[str]) -> None:
    """Measure and print; finished seeds are kept in --rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="as for `zsq quantize`")
    parser.add_argument("--weights")
    parser.add_argument("--input-size", required=True, help="C,H,W; H and W multiples of 4")
    parser.add_argument("--mean", required=True)
    parser.add_argument("--std", required=True)
    parser.add_argument("--data", required=True, help="labelled images")
    parser.add_argument("--bits", default="W4A4,W3A3,W2A4")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--published", default="256,300,400", help="images, steps a batch, steps a unit")
    parser.add_argument("--ours", default="128,100,100", help="the same")
    parser.add_argument("--precision", default="bfloat16", help="of zsq's synthesis")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="finished seeds")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table as Markdown")
    options = parser.parse_args(arguments)
    for name in ("model", "weights", "data"):
        setattr(options, name, os.path.expandvars(getattr(options, name) or "") or None)
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = options.rows.read_text().splitlines() if options.rows and options.rows.exists() else []
    rows = [json.loads(line) for line in lines]
    for seed in (int(text) for text in options.seeds.split(",")):
        if seed not in {row["seed"] for row in rows}:
            rows.append(one_seed(options, seed))
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    command = shlex.join(["python", "benchmarks/to_accuracy.py", *arguments])
    text = (
        f"# Time to the same accuracy\n\nWritten by `{command}`, which says what is compared. Images, steps "
        f"a batch and steps a unit: published {options.published}, zsq {options.ours}.\n\n"
        f"{table(rows, options.bits.split(','))}\n"
    )
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
