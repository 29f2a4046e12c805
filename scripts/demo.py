"""The demo: quantize the bundled digits network without data, then measure on real handwritten digits.

Runs Genie at W4A4 and W2A4, evaluates on the test digits of scikit-learn (which nothing was trained, made or
tuned on), writes a run folder each, with a picture of the synthetic images, and prints one table.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.status import Status
from rich.table import Table
from torch import Tensor

import zsq
from zsq.bundled import digits_split
from zsq.progress import Progress

BITS = ("W4A4", "W2A4")


def test_digits(teacher: zsq.Teacher) -> Iterator[tuple[Tensor, Tensor]]:
    """The test images, normalised as the teacher expects them, and their labels, in one batch."""
    _, _, images, labels = digits_split()
    pixels = torch.from_numpy(images).float().div(255)[:, None]
    yield (pixels - teacher.spec.mean[0]) / teacher.spec.std[0], torch.from_numpy(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where the run folders go")
    parser.add_argument("--budget", default="standard", help="quick, standard or paper")
    arguments = parser.parse_args()
    console = Console()
    teacher = zsq.load_model("digits")
    before = zsq.accuracy(teacher.module, test_digits(teacher))
    table = Table(title=f"digits, Genie without data, {before.num_images} real test images")
    stages = ("synthesize", "reconstruct", "rest")
    for column in ("bits", "top-1 before", "top-1 after", "size before", "size after", *stages):
        table.add_column(column, justify="right")
    for bits in BITS:
        out = arguments.out / bits
        with console.status(f"quantizing to {bits}") as status:

            def show(event: Progress, bits: str = bits, status: Status = status) -> None:
                text = f"{bits}: {event.stage}, {event.item} ({event.done} of {event.total} steps)"
                status.update(text)

            run = zsq.quantize(
                teacher,
                recipe="genie",
                bits=bits,
                budget=arguments.budget,
                out=out,
                force=True,
                progress=show,
            )
        after = zsq.accuracy(run.student, test_digits(teacher))
        size = run.record["results"]["size"]
        times = dict(run.record["timings"])
        seconds = [times.pop(stage) for stage in stages[:2]]
        seconds.append(sum(times.values()))
        table.add_row(
            bits,
            f"{before.top1:.2f} %",
            f"{after.top1:.2f} %",
            f"{size['teacher_bytes'] / 1000:.1f} kB",
            f"{(out / 'student.safetensors').stat().st_size / 1000:.1f} kB",
            *(f"{s:.1f} s" for s in seconds),
        )
    console.print(table)
    for bits in BITS:
        console.print(f"{bits}: {arguments.out / bits} (the synthetic images: images.png)", highlight=False)


if __name__ == "__main__":
    main()
