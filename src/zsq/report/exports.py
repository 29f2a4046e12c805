"""Files for engines beside a run: how far they agree with it, and how fast they were."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsq.run import LATENCIES

SETTINGS = (".onnx.json", ".pt2.json")  # what `zsq export` writes beside a file ends so
SAME_RUN = {"zsq.bits": ("bits",), "zsq.seed": ("seed",), "zsq.teacher_sha256": ("model", "sha256")}


@dataclass(frozen=True)
class Exported:
    """A file, with its texts for the page; `stale` if it was made from another run."""

    file: str
    size: int
    engine: str
    num_images: int
    outputs: tuple[tuple[str, str, str, str], ...]  # name, same class, largest difference, relative error
    notes: tuple[str, ...]
    stale: bool


def exported(folder: Path | None, record: Mapping[str, Any]) -> list[Exported]:
    """What `zsq export` left in a run folder.

    Raises:
        KeyError, TypeError, ValueError, OSError: a file is damaged.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder is not None else ():
        if path.name.endswith(SETTINGS) and path.with_suffix("").is_file():
            about = json.loads(path.read_text(encoding="utf-8"))
            check = about["verified_on_synthetic_images"]
            outputs = check["outputs"] if "outputs" in check else check["optimized"]
            found.append(
                Exported(
                    file=str(about["file"]),
                    size=int(about["bytes"]),
                    engine=str(about["engine"]),
                    num_images=int(check["num_images"]),
                    outputs=tuple(_output(o) for o in outputs),
                    notes=tuple(map(str, about["notes"])),
                    stale=_is_stale(about, record),
                )
            )
    return found


def latencies(folder: Path | None) -> list[dict[str, Any]]:
    """What `zsq bench-latency` measured of a run, in order of time.

    Raises:
        TypeError, ValueError, OSError: the file is damaged.
    """
    path = None if folder is None else folder / LATENCIES
    if path is None or not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = ("engine", "container", "batch_size", "threads", "date")
    numbers = ("float_ms", "quantized_ms", "ratio")
    return [
        {
            **{key: str(row[key]) for key in texts},
            **{key: float(row[key]) for key in numbers},
            **dict(zip(("low", "high"), map(float, row["ratio_quartiles"]), strict=True)),
        }
        for row in rows
    ]


def _output(about: Mapping[str, Any]) -> tuple[str, str, str, str]:
    same, most = about["argmax_agreement"], about["max_steps"]
    return (
        str(about["name"]),
        "" if same is None else f"{same:.2f} %",
        "" if most is None else f"{most:.2g} steps",
        f"{about['relative_error']:.1e}",
    )


def _is_stale(about: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    for key, path in SAME_RUN.items():
        value: Any = record
        for part in path:
            value = value[part]
        if key in about and about[key] != str(value):
            return True
    return False
