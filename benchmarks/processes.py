"""How well processes share the synthesis of images: a step of all batches, in one process and in several.

    python benchmarks/processes.py digits
    python benchmarks/processes.py MODEL --processes 2 -- --weights w.safetensors --input-size 3,32,32

What follows `--` goes to `zsq synthesize`; variables of the environment are expanded. Every process has one
thread. Both take turns with few and with more steps: the difference is what steps cost, without starting.
Efficiency is the time of one process over that of N times N. The images must be the same bits.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from work import median

BATCH = 128  # images


def seconds(command: Sequence[str]) -> float:
    """That a command takes.

    Raises:
        SystemExit: it failed.
    """
    started = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - started


def turn(command: Sequence[str], launchers: dict[int, list[str]], steps: tuple[int, int]) -> dict[int, float]:
    """Seconds a step of all batches, by processes.

    Raises:
        SystemExit: a command failed, or the images differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        taken: dict[int, list[float]] = {count: [] for count in launchers}
        for number in steps:
            for count, launcher in launchers.items():
                out = f"{folder}/{count}-{number}"
                more = ["--set", f"synthesis.steps={number}", "--out", out]
                taken[count].append(seconds([sys.executable, "-m", *launcher, *command, *more]))
            made = {Path(f"{folder}/{n}-{number}/images.safetensors").read_bytes() for n in launchers}
            if len(made) > 1:
                raise SystemExit("The processes made other images than one alone.")
    return {count: (b - a) / (steps[1] - steps[0]) for count, (a, b) in taken.items()}


def table(turns: Sequence[dict[int, float]]) -> str:
    """The turns in Markdown."""
    one, several = sorted(turns[0])
    lines = [
        f"| turn | one process, s/step | {several} processes, s/step | efficiency |",
        "|---|---:|---:|---:|",
    ]
    rows = {str(number): found for number, found in enumerate(turns, 1)}
    rows["median"] = {count: median([found[count] for found in turns]) for count in (one, several)}
    for name, found in rows.items():
        share = found[one] / (several * found[several])
        lines.append(f"| {name} | {found[one]:.3f} | {found[several]:.3f} | {share:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="digits", help="as for `zsq synthesize`")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=BATCH, help="images; there is a batch a process")
    parser.add_argument("--steps", type=int, nargs=2, default=(10, 40), help="few, and more")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("options", nargs="*", help="of zsq synthesize, after --")
    options = parser.parse_args(arguments)
    command = ["zsq", "synthesize", options.model, *options.options]
    for name, value in (
        ("num_images", options.batch_size * options.processes),
        ("batch_size", options.batch_size),
    ):
        command += ["--set", f"synthesis.{name}={value}"]
    command = [os.path.expandvars(part) for part in command]
    together = ["torch.distributed.run", "--nproc-per-node", str(options.processes), "-m"]
    launchers: dict[int, list[str]] = {1: [], options.processes: together}
    print(table([turn(command, launchers, tuple(options.steps)) for _ in range(options.turns)]))


if __name__ == "__main__":
    main(sys.argv[1:])
