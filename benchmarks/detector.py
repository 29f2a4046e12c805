"""The detector, exported: mean average precision of the file beside its student's and the float network's.

    ZSQ_DATA=DIR python benchmarks/detector.py --write benchmarks/results/detector.md

ZSQ_DATA names the folder of networks and images. W8A8, recipe `given-nearest`: ranges from real images,
nothing learned. The images are cut into two halves; the student that is measured on one half has its ranges
from the other, and the detections of both go into one figure. The file runs in ONNX Runtime. "Rounding alone"
is the student in float64 beside the student in float32.
"""

import argparse
import copy
import csv
import io
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import zsq
from zsq.bench_file import existing_path, expanded
from zsq.export.engine import open_engine
from zsq.export.integer import fused_operators
from zsq.export.onnx import export_onnx

MODEL, WEIGHTS = "${ZSQ_DATA}/nets.py:coco_fastestdet", "${ZSQ_DATA}/weights/coco_fastestdet.safetensors"
IMAGES, SIZE = "${ZSQ_DATA}/coco_val128_dev.zip", 352
MIN_SCORE, NMS_OVERLAP, MATCH_OVERLAP = 0.001, 0.45, 0.5
RECALLS = np.linspace(0, 1, 101)
BATCH = 8
BITS = "W8A8"
PLACEMENTS = ("research", "engine")


@dataclass(frozen=True)
class Boxes:
    """Of one image: corners (M, 4) as x0, y0, x1, y1 relative to the image, classes (M,), scores (M,)."""

    corners: Tensor
    classes: Tensor
    scores: Tensor


def decode(output: Tensor) -> list[Boxes]:
    """What the network sees in each image, after class-wise non-maximum suppression.

    Args:
        output: (N, 85, H, W): objectness, four box numbers and 80 class probabilities a cell.
    """
    height, width = output.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    middle_x = (output[:, 1].tanh() + columns) / width
    middle_y = (output[:, 2].tanh() + rows) / height
    half_width, half_height = output[:, 3].sigmoid() / 2, output[:, 4].sigmoid() / 2
    corners = torch.stack(
        (middle_x - half_width, middle_y - half_height, middle_x + half_width, middle_y + half_height), -1
    )
    likeliest, classes = output[:, 5:].max(1)
    scores = output[:, 0] ** 0.6 * likeliest**0.4
    found = []
    for box, of_class, score in zip(
        corners.flatten(1, 2), classes.flatten(1), scores.flatten(1), strict=True
    ):
        seen = score > MIN_SCORE
        found.append(suppressed(Boxes(box[seen], of_class[seen], score[seen])))
    return found


def suppressed(boxes: Boxes) -> Boxes:
    """Without boxes that overlap a better one of their class."""
    order = boxes.scores.argsort(descending=True, stable=True)
    corners, classes = boxes.corners[order], boxes.classes[order]
    rivals = (overlap(corners, corners) > NMS_OVERLAP) & (classes[:, None] == classes)
    kept: list[int] = []
    for index in range(len(order)):
        if not bool(rivals[index, kept].any()):
            kept.append(index)
    return Boxes(corners[kept], classes[kept], boxes.scores[order][kept])


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union, (M, 4) and (K, 4) -> (M, K)."""
    low = torch.maximum(boxes[:, None, :2], others[:, :2])
    high = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others))
    return shared / (areas[:, None] + other_areas - shared)


def mean_average_precision(found: Sequence[Boxes], wanted: Sequence[Boxes]) -> float:
    """At an overlap of 0.5: the mean, over the classes present, of precision at 101 levels of recall."""
    classes = sorted({int(c) for image in wanted for c in image.classes})
    return float(np.mean([average_precision(found, wanted, c) for c in classes]))


def average_precision(found: Sequence[Boxes], wanted: Sequence[Boxes], of_class: int) -> float:
    """Of one class; each box that was wanted is found by the best-scored box that overlaps it the most."""
    hits: list[tuple[float, bool]] = []
    total = 0
    for seen, true in zip(found, wanted, strict=True):
        targets = true.corners[true.classes == of_class]
        total += len(targets)
        mine = seen.classes == of_class
        overlaps = overlap(seen.corners[mine], targets)
        free = torch.ones(len(targets), dtype=torch.bool)
        scores = seen.scores[mine]
        for index in scores.argsort(descending=True, stable=True).tolist():
            candidates = overlaps[index] * free
            best = int(candidates.argmax()) if len(targets) else -1
            hit = best >= 0 and float(candidates[best]) >= MATCH_OVERLAP
            if hit:
                free[best] = False
            hits.append((float(scores[index]), hit))
    hits.sort(key=lambda pair: -pair[0])
    true_positives = np.cumsum([hit for _, hit in hits]) if hits else np.zeros(0)
    precision = true_positives / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
    reached = np.searchsorted(true_positives / total, RECALLS, side="left")
    return float(np.mean([precision[i] if i < len(precision) else 0.0 for i in reached]))


def labelled(path: Path) -> tuple[Tensor, list[Boxes]]:
    """Images (N, 3, H, W) in [0, 1], blue first as the network wants them, and their boxes."""
    boxes: dict[str, list[list[float]]] = defaultdict(list)
    with zipfile.ZipFile(path) as archive:
        for row in csv.DictReader(io.StringIO(archive.read("labels.csv").decode())):
            x, y, width, height = (float(row[key]) for key in ("cx", "cy", "w", "h"))
            corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            boxes[row["file"]].append([float(row["class"]), *corners])
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        pixels = [
            np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))[..., ::-1] for name in names
        ]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    tables = [torch.tensor(boxes[name]).reshape(-1, 5) for name in names]
    return images, [Boxes(t[:, 1:], t[:, 0].long(), torch.ones(len(t))) for t in tables]


@torch.no_grad()
def outputs(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Of all images, (N, 85, H, W)."""
    return torch.cat([model(part) for part in images.split(BATCH)])


@dataclass(frozen=True)
class Row:
    """What one export gave; pairs are of the file and of the student in float64."""

    placement: str
    student: float
    others: tuple[float, float]
    same_class: tuple[float, float]
    relative_error: tuple[float, float]
    size: int
    in_integers: str


def measured(teacher: zsq.Teacher, images: Tensor, wanted: Sequence[Boxes], placement: str) -> Row:
    """Of both halves of the images, each with ranges from the other one."""
    halves = (slice(None, None, 2), slice(1, None, 2))
    got: list[tuple[Tensor, Tensor, Tensor]] = []
    boxes: list[Boxes] = []
    for index in (0, 1):
        run = zsq.quantize(
            teacher,
            recipe="given-nearest",
            bits=BITS,
            placement=placement,
            images=images[halves[1 - index]],
            overrides={"num_holdout": 0},
        )
        with tempfile.TemporaryDirectory() as folder:
            export = export_onnx(run, Path(folder) / "detector.onnx")
            content, session = export.path.read_bytes(), export.verification.session
            file = open_engine(export.path).model
            held_out = images[halves[index]]
            precise = outputs(copy.deepcopy(run.student).double(), held_out.double()).float()
            got.append((outputs(run.student, held_out), outputs(file, held_out), precise))
        boxes += wanted[halves[index]]
    student, *others = (torch.cat(parts) for parts in zip(*got, strict=True))
    fused = fused_operators(content, session)
    return Row(
        placement=placement,
        student=mean_average_precision(decode(student), boxes),
        others=_pair(lambda y: mean_average_precision(decode(y), boxes), others),
        same_class=_pair(lambda y: 100 * float((classes(y) == classes(student)).double().mean()), others),
        relative_error=_pair(lambda y: float((y - student).norm() / student.norm()), others),
        size=export.size,
        in_integers=f"{fused.convolutions} / {fused.convolutions + fused.float_convolutions}",
    )


def classes(output: Tensor) -> Tensor:
    """The likeliest of every cell."""
    return output[:, 5:].argmax(1)


def _pair(figure: Callable[[Tensor], float], of: Sequence[Tensor]) -> tuple[float, float]:
    first, second = map(figure, of)
    return first, second


def table(rows: Sequence[Row], in_float: float, parameters: int) -> str:
    """In Markdown."""
    lines = [
        f"The float network: {in_float:.3f}, {4 * parameters / 1e6:.2f} MB.",
        "",
        "| placement | MB | convolutions in integers | mAP student | mAP file | file - student "
        "| same class a cell % | relative error | rounding alone: mAP | same class % | relative error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        (file, precise), (same, rounded), (error, rounding) = row.others, row.same_class, row.relative_error
        lines.append(
            f"| {row.placement} | {row.size / 1e6:.2f} | {row.in_integers} | {row.student:.3f} "
            f"| {file:.3f} | {file - row.student:+.3f} | {same:.2f} | {error:.4f} | {precise:.3f} "
            f"| {rounded:.2f} | {rounding:.4f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything; print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", type=Path, help="file for the table, under what it says before it")
    parser.add_argument("--limit", type=int, help="of the images")
    options = parser.parse_args(arguments)
    teacher = zsq.load_model(
        expanded(MODEL, "model"),
        weights=existing_path(WEIGHTS, "weights"),
        input_size=(3, SIZE, SIZE),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    path = existing_path(IMAGES, "images")
    assert path is not None
    images, wanted = labelled(path)
    images, wanted = images[: options.limit], wanted[: options.limit]
    in_float = mean_average_precision(decode(outputs(teacher.module, images)), wanted)
    print(f"float: {in_float:.3f} on {len(images)} images", flush=True)
    rows = []
    for placement in PLACEMENTS:
        rows.append(measured(teacher, images, wanted, placement))
        print(rows[-1], flush=True)
    text = table(rows, in_float, sum(p.numel() for p in teacher.module.parameters()))
    if options.write:
        before = options.write.read_text(encoding="utf-8") if options.write.exists() else ""
        head = before.partition("\nThe float network:")[0].rstrip()
        options.write.write_text(f"{head}\n\n{text}\n".lstrip(), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
