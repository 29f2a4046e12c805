"""How time and memory grow with the number of images, their size and the network.

    python benchmarks/growth.py --write benchmarks/results/growth.md --plot docs/growth.svg

One of three numbers is changed at a time. Each stage of each case is a process of its own, with one thread.
Time is that of the processor, so that other work on the machine matters little. Memory is what a stage adds
to the process at its highest. The network is a plain residual one of random weights. Synthesis takes 4
steps a batch of at most 64 images. Reconstruction (W4A4, minibatches of 32) takes 20 steps a unit: its
steps cost the same for any number of images, and what is done once for every image is not small beside so
few of them. An exponent p says that doubling the number multiplies the cost by 2^p; it is fitted to the
last three cases, as a constant part hides it in the first ones.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from work import added_memory, count_work

from zsq.allocator import keep_freed_memory
from zsq.graph.blocks import split
from zsq.images.settings import Synthesis
from zsq.images.synthesize import synthesize
from zsq.models import Teacher
from zsq.pipeline import compose_recipe
from zsq.quant.attach import attach
from zsq.recover.reconstruct import reconstruct
from zsq.rng import rng_for
from zsq.stages import captured

STEPS, UNIT_STEPS, BATCH = 4, 20, 64
STAGES = ("synthesis", "reconstruction")


@dataclass(frozen=True)
class Case:
    """What is computed: number of images, their height and width, residual blocks a stage of the network."""

    images: int = 64
    size: int = 32
    blocks: int = 1


AXES = {
    "images": [Case(images=n) for n in (64, 128, 256, 512, 1024)],
    "size": [Case(images=16, size=n) for n in (32, 64, 128, 224)],
    "blocks": [Case(blocks=n) for n in (1, 2, 4, 8)],
}
TITLES = {"images": "images", "size": "height and width, pixels", "blocks": "residual blocks a stage"}


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def network(blocks: int) -> nn.Module:
    """Three stages of 16, 32 and 64 channels, like the residual networks for CIFAR."""
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for width in (16, 32, 64):
        for index in range(blocks):
            parts.append(Block(before, width, 2 if index == 0 and width > 16 else 1))
            before = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def measure(case: Case, stage: str) -> dict[str, Any]:
    """Processor seconds and MiB of a stage of a case, and multiplications of a forward pass."""
    torch.manual_seed(0)
    size = (3, case.size, case.size)
    teacher = Teacher(network(case.blocks).eval(), input_size=size, mean=(0.5,) * 3, std=(0.25,) * 3)
    graph = captured(teacher, torch.device("cpu"))
    recipe = compose_recipe("genie", bits="W4A4", budget="paper")
    assert isinstance(recipe.synthesis, Synthesis) and recipe.reconstruction is not None
    source = replace(recipe.synthesis, num_images=case.images, batch_size=BATCH, steps=STEPS)
    learning = replace(recipe.reconstruction, steps=UNIT_STEPS)
    images = torch.randn(case.images, *size, generator=rng_for(0, "noise"))

    def make(count: int = case.images) -> None:
        synthesize(
            graph, replace(source, num_images=count), size, seed=0, finished={}, log=lambda *values: None
        )

    def learn(count: int = case.images) -> None:
        student, quantizers = attach(graph, recipe.scheme)
        reconstruct(
            graph,
            student,
            quantizers,
            split(graph.graph),
            images[:count],
            settings=learning,
            calibration=recipe.calibration,
            seed=0,
            finished={},
            log=lambda *values: None,
        )

    program = {"synthesis": make, "reconstruction": learn}[stage]
    program(2)  # what the first call of anything costs
    seconds = 0.0

    def clocked() -> None:
        nonlocal seconds
        started = time.process_time()
        program()
        seconds = time.process_time() - started

    mib = added_memory(clocked, torch.device("cpu"))
    macs = count_work(lambda: teacher.module(images[:1])).macs
    return {"seconds": seconds, "mib": mib, "macs": macs}


def exponent(numbers: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log(cost) over log(number), least squares over the last three."""
    last = min(3, len(numbers))
    slope, _ = np.polyfit(np.log(numbers[-last:]), np.log(np.maximum(costs[-last:], 1e-9)), 1)
    return round(float(slope), 2) + 0.0  # not -0.00


def tables(results: dict[str, list[dict[str, Any]]]) -> str:
    """The report in Markdown."""
    lines = []
    for axis, cases in AXES.items():
        lines += [f"## By {TITLES[axis]}", ""]
        lines += [
            f"| {TITLES[axis]} | MMAC an image | synthesis s | MiB | reconstruction s | MiB |",
            "|---|" + "---:|" * 5,
        ]
        for case, found in zip(cases, results[axis], strict=True):
            cells = [str(getattr(case, axis)), f"{found['synthesis']['macs'] / 1e6:.1f}"]
            for stage in STAGES:
                cells += [f"{found[stage]['seconds']:.2f}", f"{found[stage]['mib']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        numbers = [float(getattr(case, axis)) for case in cases]
        cells = ["exponent", f"{exponent(numbers, [f['synthesis']['macs'] for f in results[axis]]):.2f}"]
        for stage in STAGES:
            for key in ("seconds", "mib"):
                cells.append(f"{exponent(numbers, [f[stage][key] for f in results[axis]]):.2f}")
        lines += [f"| {' | '.join(cells)} |", ""]
    return "\n".join(lines)


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Six panels: time and memory over each of the three numbers, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), layout="constrained")
    panels = figure.subplots(2, len(AXES))
    for column, (axis, cases) in enumerate(AXES.items()):
        numbers = [getattr(case, axis) for case in cases]
        for panel, key in zip(panels[:, column], ("seconds", "mib"), strict=True):
            for stage in STAGES:
                panel.plot(numbers, [f[stage][key] for f in results[axis]], marker="o", label=stage)
            panel.set(xscale="log", yscale="log", xlabel=TITLES[axis], xticks=numbers)
            panel.set_xticklabels([str(number) for number in numbers])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("processor seconds")
    panels[1, 0].set_ylabel("memory added, MiB")
    panels[0, 0].legend()
    figure.savefig(path)


def main(arguments: Sequence[str]) -> None:
    """Measure every case in a process of its own and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the tables as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the curves, .svg or .png")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="finished cases, from which a stopped run goes on"
    )
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.case:
        keep_freed_memory()
        *numbers, stage = options.case
        print(json.dumps(measure(Case(*map(int, numbers)), stage)))
        return
    rows = options.rows.read_text().splitlines() if options.rows and options.rows.exists() else []
    known = {tuple(row["case"]): row["found"] for row in map(json.loads, rows)}

    def found(case: Case, stage: str) -> dict[str, Any]:
        key = (*(str(number) for number in astuple(case)), stage)
        if key not in known:
            print(" ".join(key), file=sys.stderr)
            command = [sys.executable, __file__, "--case", *key]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            known[key] = json.loads(done.stdout.splitlines()[-1])
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps({"case": key, "found": known[key]}) + "\n")
        return dict(known[key])

    results = {
        axis: [{stage: found(case, stage) for stage in STAGES} for case in cases]
        for axis, cases in AXES.items()
    }
    command_line = shlex.join(["python", "benchmarks/growth.py", *arguments])
    text = f"# Growth\n\nWritten by `{command_line}`, which says what is measured.\n\n{tables(results)}"
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
