"""What SADAG's images cost beside Genie's, in one run: synthesis, the short student, and the refinement.

    python benchmarks/refinement_cost.py benchmarks/sadag_bits.toml \\
        --write benchmarks/results/refinement_cost.md

The networks are those of a benchmark file. Genie's images are made twice, before and after everything else;
each way of refining then starts from the same images and a student of its own. Seconds are those of the
processor, with one thread, so that other work on the machine matters little; everything is in float32, as
the refinement is in any case.
"""

import argparse
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsq.allocator import keep_freed_memory
from zsq.bench_file import read_bench
from zsq.bench_plan import plan_network
from zsq.models import Teacher
from zsq.pipeline import quantize, synthesize_images
from zsq.progress import Progress

WAYS: dict[str, dict[str, Any]] = {
    "searched, one step": {},
    "searched, three steps": {"refinement.neighbour_steps": 3},
    "published search": {"refinement.neighbour": "published"},
    "carried": {"refinement.neighbour": "carried"},
    "carried, gradients of the last unit": {
        "refinement.neighbour": "carried",
        "refinement.gradients": "last_unit",
    },
    "carried, gradients of all units": {
        "refinement.neighbour": "carried",
        "refinement.gradients": "all_units",
    },
}


class Clock:
    """Adds up processor seconds by stage, from one report of progress to the next; none before the first."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last: float | None = None

    def __call__(self, progress: Progress) -> None:
        now = time.process_time()
        taken = 0.0 if self._last is None else now - self._last
        self.seconds[progress.stage] = self.seconds.get(progress.stage, 0.0) + taken
        self._last = now


def of_synthesis(teacher: Teacher, common: Mapping[str, Any], made: dict[str, dict[str, Tensor]]) -> float:
    """Seconds of Genie's images, which `made` keeps."""
    clock = Clock()
    synthesize_images(teacher, recipe="genie", made=made, progress=clock, overrides=common, budget="quick")
    return clock.seconds["synthesize"]


def measured(teacher: Teacher, bits: str) -> tuple[float, dict[str, tuple[float, float]]]:
    """Seconds of synthesis; and of every way, those of the student and of the refinement."""
    common: dict[str, Any] = {"num_holdout": 0, "reconstruction.steps": 1}
    made: dict[str, dict[str, Tensor]] = {}
    before = of_synthesis(teacher, common, made)
    found: dict[str, tuple[float, float]] = {}
    for way, overrides in WAYS.items():
        clock = Clock()
        quantize(
            teacher,
            recipe="sadag",
            bits=bits,
            budget="quick",
            overrides=common | overrides,
            made=made,
            progress=clock,
        )
        found[way] = clock.seconds["warm-up"], clock.seconds["refine"]
    return (before + of_synthesis(teacher, common, {})) / 2, found


def rows(name: str, synthesis: float, found: Mapping[str, tuple[float, float]]) -> list[str]:
    """Lines of the table for a network."""
    lines = []
    for way, (student, refinement) in found.items():
        ratios = [(synthesis + added) / synthesis for added in (refinement, refinement + student)]
        cells = [f"{value:.1f}" for value in (synthesis, student, refinement)] + [f"{r:.2f}" for r in ratios]
        lines.append(f"| {name} | {way} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", help="benchmark file whose networks are taken")
    parser.add_argument("--bits", default="W2A2")
    parser.add_argument("--write", type=Path, help="file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    command = f"python benchmarks/refinement_cost.py {shlex.quote(arguments.file)} --bits {arguments.bits}"
    lines = [
        "# Cost of refining images",
        "",
        "Processor seconds at the quick budget, one thread, float32; written by",
        "",
        f"    {command} --write {arguments.write}",
        "",
        f"torch {torch.__version__}, {os.cpu_count()} cores.",
        "",
        "Ratios are to Genie's images: with the refinement, and with the refinement and its student.",
        "",
        "| network | neighbours | Genie's images | student | refinement | ratio | with student |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    bench = read_bench(Path(arguments.file))
    for network in bench.networks:
        lines += rows(network.name, *measured(plan_network(bench, network).teacher, arguments.bits))
        print("\n".join(lines[-len(WAYS) :]), flush=True)
        if arguments.write is not None:
            arguments.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
