r"""zsq beside Sony's model-compression-toolkit, which also makes images without data: time, images, accuracy.

    python benchmarks/toolkit.py '${ZSQ_DATA}/nets.py:cifar100_resnet20s' \
        --weights '${ZSQ_DATA}/weights/cifar100_resnet20s.safetensors' --input-size 3,32,32 \
        --mean 0.507,0.487,0.441 --std 0.267,0.256,0.276 --data '${ZSQ_DATA}/cifar100_test_dev.npz' \
        --work FOLDER --write benchmarks/results/toolkit.md

The toolkit goes into an environment of its own, with zsq: `python -m venv toolkit`, then
`toolkit/bin/pip install model-compression-toolkit torchvision -e .`.

Three things are measured, with one thread, in one process, the programs taking turns:

* speed: short blocks of steps of every program, several rounds; the median over the rounds of the ratios;
* images: those of whole runs of as many images and steps, all judged by the same BatchNorm distance;
* accuracy: the same images given to zsq's reconstruction and to the toolkit's gradient PTQ.

Seconds are those of the processor. What is finished is kept in --work, so a stopped command goes on.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from toolkit_programs import free_output, generate, gradient_ptq, import_toolkit
from torch import Tensor

import zsq
from zsq.allocator import keep_freed_memory
from zsq.data import open_dataset
from zsq.evaluate import accuracy
from zsq.images.forward import observe
from zsq.images.look_settings import Cosine
from zsq.images.losses import BatchNormStatistics
from zsq.images.pixel_settings import PixelSynthesis, StatisticsMatch
from zsq.images.pixels import synthesize_pixels
from zsq.images.prior import pixel_limits
from zsq.images.settings import Synthesis
from zsq.images.synthesize import synthesize
from zsq.models import Teacher
from zsq.stages import captured

Row = dict[str, Any]
# A program: number of steps -> images, and the processor time at the end of every step.
Program = Callable[[int], tuple[Tensor, list[float]]]
TOOLKIT, TUNED = "toolkit", "toolkit, tuned"
PIXELS = "zsq pixels, bfloat16"
OURS = {"zsq float32": "float32", "zsq bfloat16": "bfloat16", PIXELS: "bfloat16"}
PIXEL_RATE = 0.3  # of 0.1, 0.3 (32 images, 100 steps, BatchNorm distance 0.62, 0.41)
PLACEMENTS = {"zsq": "research", "zsq, engine": "engine"}
MOST_MARKS = 20  # zsq logs about so many steps of a batch


def zsq_images(
    teacher: Teacher,
    steps: int,
    *,
    num_images: int,
    batch_size: int,
    precision: str,
    seed: int,
    pixels: bool = False,
) -> tuple[Tensor, list[float]]:
    """The images of `genie`, and the processor time at the end of the steps that were logged.

    With `pixels`, pixels are optimised themselves as the toolkit does, for the same statistics of a batch.
    """
    counts: Any = {
        "num_images": num_images,
        "batch_size": batch_size,
        "steps": steps,
        "precision": precision,
    }
    ends: list[float] = []
    shared: Any = {"seed": seed, "finished": {}, "log": lambda *_: ends.append(time.process_time())}
    graph, size = captured(teacher, torch.device("cpu")), teacher.spec.input_size
    if not pixels:
        return synthesize(graph, Synthesis(**counts), size, **shared), ends
    source = PixelSynthesis(**counts, bn=StatisticsMatch(), lr=PIXEL_RATE, cosine=Cosine(), valid_pixels=True)
    return synthesize_pixels(graph, source, size, limits=pixel_limits(teacher.spec), **shared), ends


def programs_of(teacher: Teacher, options: argparse.Namespace) -> dict[str, Program]:
    """All that make images, by name."""
    counts = {"num_images": options.num_images, "batch_size": options.batch_size, "seed": options.seed}
    theirs = {
        name: partial(lambda steps, tuned: generate(teacher, steps=steps, tuned=tuned, **counts), tuned=tuned)
        for name, tuned in ((TOOLKIT, False), (TUNED, True))
    }
    ours = {
        name: partial(zsq_images, teacher, precision=precision, pixels=name == PIXELS, **counts)
        for name, precision in OURS.items()
    }
    return {**theirs, **ours}


def step_seconds(ends: Sequence[float]) -> float:
    """Median of the steps but the first, which comes with preparations; from the ends of all."""
    return statistics.median(after - before for before, after in zip(ends, ends[1:], strict=False))


def take_turns(programs: Mapping[str, Program], steps: int, turn: int) -> dict[str, float]:
    """Seconds a step of every program, one block each; each turn begins with another one."""
    names = list(programs)
    first = turn % len(names)
    return {name: step_seconds(programs[name](steps)[1]) for name in names[first:] + names[:first]}


def bn_distance(teacher: Teacher, images: Tensor) -> float:
    """Distance of images to the BatchNorm statistics of the network as it is, without swing."""
    observer = observe(captured(teacher, torch.device("cpu")))
    with torch.no_grad():
        return float(BatchNormStatistics()(observer(images)))


class Work:
    """Finished rows and images in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "rows.jsonl"
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def row(self, key: Row, make: Callable[[], Row]) -> Row:
        """The row of a key, made if it is not there."""
        for row in self.rows:
            if row.items() >= key.items():
                return row
        self.rows.append(key | make())
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        print(json.dumps(self.rows[-1]), flush=True)
        return self.rows[-1]

    def images(self, name: str, steps: int) -> Path:
        """Where the images of a program are."""
        return self.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{steps}.safetensors"


def measure_images(work: Work, teacher: Teacher, options: argparse.Namespace, name: str, steps: int) -> Row:
    """A whole run of a program: its seconds and what its images are."""
    started = time.process_time()
    images, _ = programs_of(teacher, options)[name](steps)
    seconds = time.process_time() - started
    save_file({"images": images.contiguous()}, work.images(name, steps))
    return {"seconds": seconds, "bn": bn_distance(teacher, images), "deviation": images.std().item()}


def measure_accuracy(
    teacher: Teacher, options: argparse.Namespace, images: Tensor, learner: str, seed: int
) -> Row:
    """A student that has learned from the images: its seconds and its top-1."""

    def top1() -> float:
        batches = open_dataset(options.data, teacher.spec).batches(250, limit=options.num_test)
        return accuracy(student, batches).top1

    started = time.process_time()
    if learner == TOOLKIT:
        student = gradient_ptq(teacher, images, bits=options.bits, steps=options.unit_steps, seed=seed)
    else:
        student = zsq.quantize(
            teacher,
            recipe="genie",
            bits=options.bits,
            placement=PLACEMENTS[learner],
            budget="quick",
            overrides={"reconstruction.steps": options.unit_steps},
            images=images,
            seed=seed,
        ).student
    row: Row = {"seconds": time.process_time() - started}
    if learner == TOOLKIT:
        row["top1_quantized_output"] = top1()
        free_output(student)
    return row | {"top1": top1()}


def speed_table(rows: Sequence[Row]) -> str:
    """Seconds a step: medians over the rounds, and the median of each round's ratio."""
    names = list(dict.fromkeys(name for row in rows for name in sorted(row["step"])))
    others = [name for name in names if name in OURS]
    head = "".join(f" its time / {name} |" for name in others)
    lines = [f"| program | s/step |{head}", "|---|---:|" + "---:|" * len(others)]
    for name in names:
        steps = [row["step"][name] for row in rows]
        ratios = [
            statistics.median(row["step"][name] / row["step"][other] for row in rows) for other in others
        ]
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {name} | {statistics.median(steps):.3f} | {cells} |")
    return "\n".join(lines)


def images_table(rows: Sequence[Row]) -> str:
    """What whole runs took and how far from the statistics their images are."""
    lines = ["| steps | program | BatchNorm distance | deviation | s |", "|---:|---|---:|---:|---:|"]
    lines += [
        f"| {row['steps']} | {row['program']} | {row['bn']:.3f} | {row['deviation']:.2f} | "
        f"{row['seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def mean_of(rows: Sequence[Row], name: str) -> str:
    """Mean and deviation over rows; empty if they do not have it."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return ""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if values[1:] else "")


def accuracy_table(rows: Sequence[Row]) -> str:
    """Top-1 over seeds, by images and learner."""
    lines = [
        "| images of | steps | learned by | top-1 | output quantized too | seeds | s |",
        "|---|---:|---|---:|---:|---|---:|",
    ]
    named = ("images", "steps", "learner")
    for key in dict.fromkeys(tuple(row[name] for name in named) for row in rows):
        found = [row for row in rows if tuple(row[name] for name in named) == key]
        means = [mean_of(found, name) for name in ("top1", "top1_quantized_output")]
        seeds = ", ".join(str(row["seed"]) for row in found)
        seconds = statistics.median(row["seconds"] for row in found)
        cells = [*map(str, key), *means, seeds, f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(rows: Sequence[Row], options: argparse.Namespace, command: str, version: str) -> str:
    """The whole file in Markdown."""
    by_stage = {s: [row for row in rows if row["stage"] == s] for s in ("speed", "images", "accuracy")}
    parts = [
        "# Beside model-compression-toolkit",
        f"Written by `{command}`, which says what is measured. {options.num_images} images, batches of "
        f"{options.batch_size}, model-compression-toolkit {version}, torch {torch.__version__}, one thread, "
        f'{platform.machine()}. Other work ran beside it, so only ratios mean something. "{TOOLKIT}" has its '
        f'defaults; "{TUNED}" is what we found to suit it best: statistics of a batch in place of those of '
        "all images, which saves a second forward pass a step, frozen weights, a learning rate of 1 in place "
        f'of 16, and no border (a negative `extra_pixels`). "zsq" is `genie`, "{PIXELS}" optimises pixels '
        "themselves as the toolkit does.",
    ]
    if by_stage["speed"]:
        parts += [
            "## Time",
            f"Blocks of {options.block} steps, {len(by_stage['speed'])} rounds.",
            speed_table(by_stage["speed"]),
        ]
    if by_stage["images"]:
        parts += ["## Images", images_table(by_stage["images"])]
    if by_stage["accuracy"]:
        test = "all" if options.num_test is None else options.num_test
        parts += [
            "## Accuracy",
            f"{options.bits}, {options.unit_steps} steps a unit (zsq) or of the whole network (toolkit), 32 "
            f"images a step, {test} test images. Weights have the same bits in the same layers. The toolkit "
            "quantizes what layers and sums return, and the images, with a zero point; zsq what convolutions "
            'read, and with "engine" much as the toolkit does.',
            accuracy_table(by_stage["accuracy"]),
        ]
    return "\n\n".join(parts) + "\n"


def measure(work: Work, teacher: Teacher, options: argparse.Namespace) -> None:
    """All that is asked for and not done yet."""
    programs = programs_of(teacher, options)
    for turn in range(options.rounds):
        work.row(
            {"stage": "speed", "round": turn},
            lambda turn=turn: {"step": take_turns(programs, options.block, turn)},  # type: ignore[misc]
        )
    counts = [int(text) for text in options.steps.split(",")]
    for steps in counts:
        for name in options.images.split(";"):
            work.row(
                {"stage": "images", "program": name, "steps": steps},
                partial(measure_images, work, teacher, options, name, steps),
            )
    for seed in (int(text) for text in options.seeds.split(",")):
        for name in options.accuracy_images.split(";"):
            images = load_file(work.images(name, counts[-1]))["images"]
            for learner in options.learners.split(";"):
                work.row(
                    {
                        "stage": "accuracy",
                        "images": name,
                        "steps": counts[-1],
                        "learner": learner,
                        "seed": seed,
                    },
                    partial(measure_accuracy, teacher, options, images, learner, seed),
                )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="as for `zsq quantize`")
    parser.add_argument("--weights")
    parser.add_argument("--input-size", required=True, help="C,H,W")
    parser.add_argument("--mean", required=True)
    parser.add_argument("--std", required=True)
    parser.add_argument("--data", required=True, help="labelled images")
    parser.add_argument("--num-images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--block", type=int, default=6, help=f"steps of a block, at most {MOST_MARKS}")
    parser.add_argument("--rounds", type=int, default=8, help="blocks of every program")
    parser.add_argument("--steps", default="100,300", help="of whole runs; accuracy has images of the last")
    parser.add_argument("--images", default=";".join((TOOLKIT, TUNED, *OURS)), help="programs of whole runs")
    parser.add_argument("--accuracy-images", default=f"zsq bfloat16;{TUNED}", help="whose images")
    parser.add_argument("--learners", default=";".join((*PLACEMENTS, TOOLKIT)))
    parser.add_argument("--bits", default="W4A8")
    parser.add_argument("--unit-steps", type=int, default=200)
    parser.add_argument("--num-test", type=int, help="test images; all if left out")
    parser.add_argument("--seed", type=int, default=0, help="of the images")
    parser.add_argument("--seeds", default="0", help="of learning")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="finished parts")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the tables as Markdown")
    options = parser.parse_args(arguments)
    if not 2 < options.block <= MOST_MARKS:
        parser.error(f"--block is {options.block}, expected 3 to {MOST_MARKS}")
    for name in ("model", "weights", "data"):
        setattr(options, name, os.path.expandvars(getattr(options, name) or "") or None)
    return options


def main(arguments: Sequence[str]) -> None:
    """Measure what is not finished, print and write the tables."""
    options = parse(arguments)
    version = import_toolkit().__version__
    torch.set_num_threads(1)
    keep_freed_memory()
    size = tuple(int(v) for v in options.input_size.split(","))
    mean, std = (tuple(map(float, v.split(","))) for v in (options.mean, options.std))
    teacher = zsq.load_model(options.model, weights=options.weights, input_size=size, mean=mean, std=std)
    work = Work(options.work)
    measure(work, teacher, options)
    command = shlex.join(["python", "benchmarks/toolkit.py", *arguments])
    text = report(work.rows, options, command, version)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
