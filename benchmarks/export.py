"""Size of exported files, and how far they agree with their students, over networks and bits.

    python benchmarks/export.py --rows runs/export/rows.jsonl --write benchmarks/results/export.md
    python benchmarks/export.py cifar10_resnet20 resnet18 --rows rows.jsonl

Networks: six of w8a8.toml (ZSQ_DATA names their folder), `digits`, and timm's resnet18 and mobilenetv2_100
with random weights, whose BatchNorms saw noise. Students round to nearest with ranges from 64 real images (32
for large ones), since nothing but their agreement with the file is looked at. Where that is below its limit,
so is measured how far the student in float32 agrees with itself in float64: what rounding alone does; and
how far the file does.
Finished rows are kept.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_networks import import_timm, show_noise
from torch import Tensor, nn

import zsq
from zsq._version import __version__
from zsq.bench_file import existing_path, expanded, read_bench
from zsq.data import open_dataset
from zsq.errors import ZsqError
from zsq.export.engine import open_engine
from zsq.export.lower import lower, serialized
from zsq.export.onnx import export_onnx
from zsq.export.prepare import prepared
from zsq.export.targets import TARGETS
from zsq.run import Run

ROOT = Path(__file__).parent
BITS = ("W8A8", "W4A8", "W4A4", "W3A3", "W2A4", "W2A2", "W4")
SIZED = ("W8A8", "W4", "W2A4")  # bits whose size is also taken with equal ends
RANDOM = ("resnet18", "mobilenetv2_100")  # timm, random weights
BATCH = 50
LIMITS = {"W8A8": 99.9}  # least agreement in percent; for other bits
OTHERS = 99.5
LARGE = 100  # pixels a side, from which on networks see fewer images
FEW = 500


@dataclass(frozen=True)
class Network:
    """A teacher with images (N, C, H, W), normalised, and labels (N,) if they have a meaning for it."""

    teacher: zsq.Teacher
    images: Tensor
    labels: Tensor | None


def networks(chosen: Sequence[str], limit: int) -> Iterator[tuple[str, Network]]:
    """The networks by name, small ones first; loaded when their turn comes."""
    listed = {n.name: n for n in read_bench(ROOT / "w8a8.toml").networks}
    wanted: tuple[str, ...] = (
        "digits",
        "cifar10_resnet8k",
        "cifar10_resnet20",
        "cifar10_wrn16_1",
        "cifar100_resnet20s",
    )
    wanted += ("imagenet_mobilenetv1_0.75", "imagenet_etinynet_1.0", *RANDOM)
    photographs = next(n.data for n in listed.values() if n.name.startswith("imagenet"))
    for name in wanted:
        if chosen and name not in chosen:
            continue
        if name == "digits":
            yield name, _digits(limit)
            continue
        if name in RANDOM:
            teacher, data, labelled = _random_timm(name), photographs, False
        else:
            entry, labelled = listed[name], True
            data = entry.data
            teacher = zsq.load_model(
                expanded(entry.model, "model"),
                weights=existing_path(entry.weights, "weights"),
                input_size=entry.input_size,
                mean=entry.mean,
                std=entry.std,
            )
        count = limit if teacher.spec.input_size[1] < LARGE else min(limit, FEW)
        path = existing_path(data, "images")
        assert path is not None
        batches = list(open_dataset(str(path), teacher.spec).batches(BATCH, limit=count))
        images, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
        yield name, Network(teacher, images, labels if labelled else None)


def _digits(limit: int) -> Network:
    from sklearn.datasets import load_digits

    teacher, data = zsq.load_model("digits"), load_digits()
    pixels = torch.tensor(np.asarray(data.images) / 16.0, dtype=torch.float32)[-limit:, None]
    images = (pixels - teacher.spec.mean[0]) / teacher.spec.std[0]
    return Network(teacher, images, torch.tensor(np.asarray(data.target))[-limit:])


def _random_timm(name: str) -> zsq.Teacher:
    timm = import_timm()
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, pretrained=False)
    return zsq.Teacher(
        show_noise(network, torch.randn(16, 3, 224, 224)),
        input_size=(3, 224, 224),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        name=name,
    )


def cells() -> list[tuple[str, str, str | None]]:
    """Bits, placement and container of every row of a network."""
    research: list[tuple[str, str, str | None]] = [(bits, "research", None) for bits in BITS]
    return [*research, ("W8A8", "engine", None), ("W4A8", "engine", "int8")]


def row(network: Network, bits: str, placement: str, container: str | None) -> dict[str, Any]:
    """What one file has: its size, and its agreement with the student on the images."""
    large = network.images.shape[-1] >= LARGE
    few, images = network.images[: 32 if large else 64], network.images
    run = _student(network, few, bits, "8bit", placement)
    weights = sum(p.numel() for p in network.teacher.module.parameters())
    found: dict[str, Any] = {"weights": weights, "images": len(images)}
    with tempfile.TemporaryDirectory() as folder:
        export = export_onnx(run, Path(folder) / "student.onnx", container=container)
        engine = open_engine(export.path).model
        student, file = (_logits(model, images) for model in (run.student, engine))
    found["bytes"], found["session"] = export.size, asdict(export.verification.session)
    found["agreement"] = _same(student.argmax(1), file.argmax(1))
    if found["agreement"] < LIMITS.get(bits, OTHERS):
        precise = _logits(copy.deepcopy(run.student).double(), images.double())
        found["rounding_agreement"] = _same(student.argmax(1), precise.argmax(1))
        found["file_rounding_agreement"] = _same(file.argmax(1), precise.argmax(1))
    if network.labels is not None:
        tops = [_same(y.argmax(1), network.labels[: len(images)]) for y in (student, file)]
        found["top1_student"], found["top1_file"] = tops
    if bits in SIZED and placement == "research":
        equal, _ = prepared(
            _student(network, few[:2], bits, "same", placement).student, few, TARGETS["onnxruntime"]
        )
        found["bytes_same"] = len(serialized(lower(equal, TARGETS["onnxruntime"], (2, 4, 8), {})))
    return found


def _same(classes: Tensor, others: Tensor) -> float:
    """In percent."""
    return 100 * float((classes == others).double().mean())


def _student(network: Network, images: Tensor, bits: str, ends: str, placement: str) -> Run:
    return zsq.quantize(
        network.teacher,
        recipe="given-nearest",
        bits=bits,
        ends=ends,
        placement=placement,
        images=images,
        overrides={"num_holdout": 0},
    )


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(BATCH)])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| network | weights | bits | placement | file / float32 | same ends | images | agreement % "
        "| student, float64 % | file, float64 % | top-1 student | file - student |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order, known = list(dict.fromkeys(r["network"] for r in rows)), cells()
    for r in sorted(
        rows,
        key=lambda r: (order.index(r["network"]), known.index((r["bits"], r["placement"], r["container"]))),
    ):
        size, same = 4 * r["weights"], r.get("bytes_same")
        bits = r["bits"] + (f", {r['container'].upper()}" if r["container"] else "")
        line = [r["network"], f"{r['weights']:,}", bits, r["placement"], f"{r['bytes'] / size:.3f}"]
        line.append("" if same is None else f"{same / size:.3f}")
        agreement = f"{r['agreement']:.2f}"
        short = r["agreement"] < LIMITS.get(r["bits"], OTHERS)
        line += [str(r["images"]), f"**{agreement}**" if short else agreement]
        exact = (r.get(key) if short else None for key in ("rounding_agreement", "file_rounding_agreement"))
        line += ["" if value is None else f"{value:.2f}" for value in exact]
        labelled = "top1_file" in r
        line.append(f"{r['top1_student']:.2f}" if labelled else "")
        line.append(f"{r['top1_file'] - r['top1_student']:+.2f}" if labelled else "")
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def main() -> None:
    """Make the rows that are missing; print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", help="of which; all by default")
    parser.add_argument("--rows", type=Path, default=Path("runs/export/rows.jsonl"), help="finished rows")
    parser.add_argument(
        "--write", type=Path, help="file for the table, under what it says before the first table"
    )
    parser.add_argument("--limit", type=int, default=1000, help=f"images; {FEW} at most for large ones")
    parser.add_argument("--only-table", action="store_true", help="make no rows")
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    done = (
        [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    )
    known = {(r["network"], r["bits"], r["placement"], r["container"]) for r in done}
    for name, network in () if options.only_table else networks(options.networks, options.limit):
        for cell in cells():
            if (name, *cell) in known:
                continue
            about = dict(zip(("bits", "placement", "container"), cell, strict=True))
            try:
                made = {"network": name, **about, "zsq": __version__, **row(network, *cell)}
            except ZsqError as error:
                print(f"{name} {cell}: {error}", flush=True)
                continue
            done.append(made)
            with options.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(made) + "\n")
            print(f"{name} {cell}: {made['agreement']:.2f} %", flush=True)
    if options.write:
        head = options.write.read_text(encoding="utf-8").partition("\n|")[0] if options.write.exists() else ""
        options.write.write_text(f"{head.rstrip()}\n\n{table(done)}\n".lstrip(), encoding="utf-8")
    else:
        print(table(done))


if __name__ == "__main__":
    main()
