"""What recording steps as CUDA graphs gains: time a step of both stages, recorded and one kernel at a time.

    python benchmarks/recorded.py digits
    python benchmarks/recorded.py timm:resnet18 --num-images 1024 --whole
    python benchmarks/recorded.py nets.py:factory --weights w.safetensors --input-size 3,32,32

`timm:NAME` is a network of timm with random weights, which serves for times. Variables of the environment are
expanded in MODEL and --weights. `--whole` also runs the standard budget with so many images and prints what
each stage took.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

import zsq.replay
from zsq.images.prior import input_prior
from zsq.images.settings import Synthesis
from zsq.images.synthesize import synthesize_batch
from zsq.kernels import reproducible
from zsq.models import Teacher, load_model
from zsq.pipeline import compose_recipe, quantize
from zsq.recover.reconstruct import reconstruct
from zsq.rng import rng_for
from zsq.stages import captured
from zsq.student_networks import attached

RECORDED, PLAIN = 3, sys.maxsize  # steps before one is recorded
DEVICE = torch.device("cuda")


def read_model(options: argparse.Namespace) -> Teacher:
    """The network that the options name."""
    if options.model.startswith("timm:"):
        import timm

        torch.manual_seed(0)
        network = timm.create_model(options.model.removeprefix("timm:"), pretrained=False)
        return Teacher(
            network, input_size=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        )
    size = tuple(int(v) for v in options.input_size.split(",")) if options.input_size else None
    weights = options.weights and os.path.expandvars(options.weights)
    return load_model(os.path.expandvars(options.model), weights=weights, input_size=size)


class Laps:
    """Seconds between calls of `log`, which waits for the device."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, float]]] = {}

    def log(self, item: str, step: int) -> None:
        """Note when a step of an item is done."""
        torch.cuda.synchronize()
        self.seen.setdefault(item, []).append((step, time.perf_counter()))

    def milliseconds(self) -> float:
        """A step's time over the second half of each item, summed over items."""
        total = 0.0
        for laps in self.seen.values():
            (first, began), (last, ended) = laps[len(laps) // 2], laps[-1]
            total += 1e3 * (ended - began) / (last - first)
        return total


def of_synthesis(
    teacher: Teacher, graph: fx.GraphModule, precision: str, count: int, steps: int
) -> tuple[float, float]:
    """Milliseconds a step of a batch of `count` images, and the peak of memory in GiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    laps = Laps()
    settings = replace(Synthesis(num_images=count, batch_size=count, steps=steps), precision=precision)  # type: ignore[arg-type]
    with reproducible(DEVICE, rounded=True):
        synthesize_batch(
            graph,
            settings,
            teacher.spec.input_size,
            count,
            rng=rng_for(0, "synthesis", 0),
            log=lambda step, _: laps.log("batch", step),
            prior=input_prior(teacher.spec),
        )
    return laps.milliseconds(), torch.cuda.max_memory_allocated() / 2**30


def of_reconstruction(teacher: Teacher, graph: fx.GraphModule, images: Tensor, steps: int) -> float:
    """Milliseconds of one step of every unit together."""
    recipe = compose_recipe("genie", bits="W4A4", overrides={"reconstruction.steps": steps})
    networks, laps = attached(graph, recipe, teacher.spec, images), Laps()

    def log(name: str, step: int, _: int, values: dict[str, float]) -> None:
        if step >= 0:
            laps.log(name, step)

    with reproducible(DEVICE):
        reconstruct(
            networks.original,
            networks.student,
            networks.quantizers,
            networks.units,
            images,
            settings=recipe.reconstruction,
            calibration=recipe.calibration,
            seed=0,
            finished={},
            log=log,
        )
    return laps.milliseconds()


def both(measure: Callable[[], float]) -> str:
    """Plain and recorded, and the ratio, as cells of a table."""
    found = []
    for warm_up in (PLAIN, RECORDED):
        zsq.replay.WARM_UP = warm_up
        found.append(measure())
    zsq.replay.WARM_UP = RECORDED
    plain, recorded = found
    return f"{plain:.2f} | {recorded:.2f} | {plain / recorded:.1f}"


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", help="as for `zsq quantize`, or timm:NAME")
    parser.add_argument("--weights")
    parser.add_argument("--input-size", help="C,H,W")
    parser.add_argument("--num-images", type=int, default=128, help="of --whole, and at most 128 a step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args(arguments)
    teacher = read_model(options)
    graph = captured(teacher, DEVICE)
    count = min(options.num_images, 128)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {teacher.name}, {count} images a step")
    print("| stage | precision | plain ms | recorded ms | ratio | GiB |")
    print("|---|---|---:|---:|---:|---:|")
    for precision in ("float32", "bfloat16"):
        peaks: list[float] = []

        def synthesis(precision: str = precision, peaks: list[float] = peaks) -> float:
            milliseconds, peak = of_synthesis(teacher, graph, precision, count, options.steps)
            peaks.append(peak)
            return milliseconds

        print(f"| synthesis | {precision} | {both(synthesis)} | {max(peaks):.1f} |", flush=True)
    noise = torch.randn(count, *teacher.spec.input_size, generator=rng_for(0, "noise")).to(DEVICE)
    cells = both(lambda: of_reconstruction(teacher, graph, noise, options.steps))
    print(f"| a step of each unit | float32 | {cells} | |", flush=True)
    if options.whole:
        overrides = {"synthesis.num_images": options.num_images, "synthesis.precision": "bfloat16"}
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        run = quantize(teacher, recipe="genie", bits="W4A4", device="cuda", overrides=overrides)
        seconds = time.perf_counter() - started
        stages = ", ".join(f"{name} {value:.1f}" for name, value in run.record["timings"].items())
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"standard budget, {options.num_images} images: {seconds:.1f} s ({stages}), {peak:.1f} GiB")


if __name__ == "__main__":
    main(sys.argv[1:])
