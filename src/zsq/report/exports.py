"""Files for engines beside a run: how far they agree with it, and how fast they were."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsq.export.account import VERIFIED
from zsq.model_card import exports_of
from zsq.run import LATENCIES

SAME_RUN = {"zsq.bits": ("bits",), "zsq.seed": ("seed",), "zsq.teacher_sha256": ("model", "sha256")}


@dataclass(frozen=True)
class Exported:
    """A file as texts for the page; without outputs if its check was not kept, `stale` if of another run."""

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
    for export in exports_of(folder) if folder is not None else ():
        about = export.about
        if not about:  # a program written before its check was kept
            found.append(Exported(export.path.name, export.path.stat().st_size, "", 0, (), (), False))
            continue
        check = about[VERIFIED]
        outputs = list(check["outputs"] if "outputs" in check else check["optimized"])
        inside = about.get("openvino", {}).get(VERIFIED, {}).get("outputs", ())
        outputs += [{**output, "name": f"{output['name']} in OpenVINO"} for output in inside]
        found.append(
            Exported(
                file=str(about["file"]),
                size=int(about["bytes"]),
                engine=str(about["engine"]),
                num_images=int(check["num_images"]),
                outputs=tuple(_output(output) for output in outputs),
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
