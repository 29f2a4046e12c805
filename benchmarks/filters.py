"""What filters leave out of a polluted set of real images: the same number by each, of three pollutions.

    python benchmarks/filters.py 'nets.py:cifar10_resnet20' --weights w.safetensors --input-size 3,32,32 \
        --mean ... --std ... --data test.npz --wrong other.npz --append benchmarks/results/filters.md

A fifth of the set is one of: Gaussian noise of the mean and deviation that the model expects; images of
another data set (--wrong); second copies of images of the set. Each filter then keeps as many images as
were clean. By chance a fifth of the pollution would be among those left out. Of a pair of equal images
either may be left out. Nothing is tuned here; the labels of the images are not looked at.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor

import zsq
from zsq.cli.arguments import read_numbers
from zsq.data import load_images
from zsq.errors import UsageError
from zsq.given_images import with_given_images
from zsq.images.prior import input_prior
from zsq.rng import rng_for
from zsq.stages import captured
from zsq.student_images import check_shaping, kept_images
from zsq.student_networks import attached

METHODS = ("energy", "bn_sensitivity", "patch_entropy", "gradient_cover", "random")
KINDS = ("noise", "another data set", "duplicates")


def polluted(kind: str, clean: Tensor, noise: Tensor, wrong: Tensor, rng: torch.Generator) -> Tensor:
    """The clean images, then a quarter as many that do not belong there."""
    count = len(clean) // 4
    others = {"noise": noise, "another data set": wrong, "duplicates": clean}[kind]
    return torch.cat([clean, others[torch.randperm(len(others), generator=rng)[:count]]])


def share_removed(images: Tensor, clean: int, kept: Tensor) -> float:
    """Percent of the pollution that is gone: for copies, of the pairs of which one or both are gone."""
    there = torch.zeros(len(images), dtype=torch.bool)
    there[kept] = True
    total, gone = len(images) - clean, 0
    for position in range(clean, len(images)):
        twins = (images[:clean] == images[position]).flatten(1).all(1)
        gone += int(not there[position] or bool((twins & ~there[:clean]).any()))
    return 100 * gone / total


def measure(arguments: argparse.Namespace, seeds: int) -> list[str]:
    """Rows of the table."""
    teacher = zsq.load_model(
        os.path.expandvars(arguments.model),
        weights=os.path.expandvars(arguments.weights) if arguments.weights else None,
        input_size=read_numbers(arguments.input_size, "--input-size", int),
        mean=read_numbers(arguments.mean, "--mean", float),
        std=read_numbers(arguments.std, "--std", float),
    )
    data, wrong = (
        load_images(os.path.expandvars(p), teacher.spec) for p in (arguments.data, arguments.wrong)
    )
    graph = captured(teacher, torch.device("cpu"))
    rows = []
    for kind in KINDS:
        cells = []
        for method in METHODS:
            found = []
            for seed in range(seeds):
                rng = rng_for(seed, "pollution")
                clean = data[torch.randperm(len(data), generator=rng)[: arguments.num_images]]
                shape = (len(clean), *teacher.spec.input_size)
                noise = input_prior(teacher.spec).apply(torch.randn(shape, generator=rng))
                images = polluted(kind, clean, noise, wrong, rng)
                overrides = {"filter": "on", "filter.method": method, "filter.keep": len(clean)}
                recipe = zsq.compose_recipe("given-nearest", bits="W4A4", overrides=overrides)
                try:
                    check_shaping(graph, recipe)
                except UsageError:  # the model has not what this filter looks at
                    break
                recipe = with_given_images(recipe, teacher, images)
                networks = attached(graph, recipe, teacher.spec, images)
                kept = kept_images(networks, images, recipe, seed)
                found.append(share_removed(images, len(clean), kept))
            cells.append(
                f"{sum(found) / len(found):.0f} ({min(found):.0f} to {max(found):.0f})" if found else "–"
            )
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    for name in ("--weights", "--input-size", "--mean", "--std"):
        parser.add_argument(name)
    parser.add_argument("--data", required=True, help="clean images")
    parser.add_argument("--wrong", required=True, help="images of another kind")
    parser.add_argument("--num-images", type=int, default=800, help="clean ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--append", type=Path, help="Markdown file to add the table to")
    arguments = parser.parse_args()
    command = shlex.join(["python", "benchmarks/filters.py", *sys.argv[1:]])
    header = f"| pollution | {' | '.join(METHODS)} |\n|---|{'---:|' * len(METHODS)}"
    rows = "\n".join(measure(arguments, arguments.seeds))
    text = (
        f"## {arguments.model.rpartition(':')[2]}\n\n`{command}`\n\nPercent of the pollution that is "
        f"left out, mean (lowest to highest) of {arguments.seeds} seeds; {arguments.num_images} clean "
        f"images and a quarter as many others, as many kept as were clean.\n\n{header}\n{rows}\n"
    )
    print(text)
    if arguments.append is not None:
        with arguments.append.open("a", encoding="utf-8") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
