"""Wrong and fuzzed run.json: exit code 2, one paragraph that names the place, nothing written."""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_input import Case, cases, check, one_paragraph, run_command, snapshot, write

Maker = Callable[[Path], object]
Json = dict[str, Any]


DELETE = object()


def record(path: str, value: Any) -> Maker:
    """run.json with another value at a dotted place, or without it."""

    def make(folder: Path) -> None:
        found = json.loads((folder / "run/run.json").read_text())
        *way, last = path.split(".")
        owner = found
        for part in way:
            owner = owner[int(part) if part.isdigit() else part]
        if value is DELETE:
            del owner[last]
        else:
            owner[last] = value
        (folder / "run/run.json").write_text(json.dumps(found))

    return make


READERS = (
    "evaluate run --data labelled.npz",
    "report run",
    "push run",
    "quantize run --out new",
    "export run",
    "synthesize run --out new",
)
STARTS = (
    "quantize run --out new",
    "synthesize run --out new --recipe noise",
    "evaluate run --data labelled.npz --teacher",
)
FIELDS: dict[str, Any] = {
    "bits": 4,
    "seed": -1,
    "device": None,
    "model": [],
    "model.name": ["digits"],
    "model.sha256": 3,
    "model.parameters": "many",
    "model.source": "file",
    "model.source.kind": None,
    "model.source.name": 7,
    "model.source.weights": {},
    "model.spec": 3,
    "model.spec.input_size": [3, 8],
    "model.spec.mean": [None, 0, 0],
    "model.spec.std": "1,1,1",
    "model.spec.crop_fraction": True,
    "model.spec.interpolation": 0.5,
    "recipe": "genie",
    "recipe.name": None,
    "recipe.paper": 0,
    "recipe.fold_batch_norm": "yes",
    "recipe.scheme": [],
    "recipe.scheme.ends": 8,
    "versions": ["torch"],
    "versions.zsq": 1.0,
    "timings": {"capture": "long"},
    "results": None,
    "results.measured": 0.99,
    "results.estimated_without_data": [],
    "results.units": {"conv1": 1},
    "results.units.0.name": 1,
    "results.units.0.snr": "high",
    "results.size": 100,
    "results.size.teacher_bytes": -1,
    "results.size.student_bytes": "small",
    "results.size.student_parts": {"codes": None},
}
RECORDS = cases(
    *(
        (
            f"without {name}",
            READERS[k % len(READERS)],
            name.replace("units.0", "units.*"),
            record(name, DELETE),
        )
        for k, name in enumerate(FIELDS)
    ),
    *(
        (
            f"with another {name}",
            READERS[(k + 3) % len(READERS)],
            name.replace("units.0", "units.*").split(".zsq")[0],
            record(name, value),
        )
        for k, (name, value) in enumerate(FIELDS.items())
    ),
    *(
        (f"of format {value!r}", READERS[k % len(READERS)], repr(value), record("format", value))
        for k, value in enumerate((0, 2, "1", None, [1], 10**30))
    ),
    *(
        (f"that {name}", READERS[k % len(READERS)], "run.json", write("run/run.json", content))
        for k, (name, content) in enumerate(
            (
                ("is empty", ""),
                ("is cut", '{"format": 1, "status"'),
                ("is a list", "[1]"),
                ("is a text", '"format"'),
                ("is no UTF-8", b"\xff\xfe{}"),
                ("is all brackets", "[" * 100_000),
                ("is all zeros", bytes(1000)),
                ("is a number of 5000 digits", "9" * 5000),
            )
        )
    ),
    ("of a run that goes on", "report run", "not finished", record("status", "running")),
    ("of no status", "evaluate run --data labelled.npz", "not finished", record("status", DELETE)),
    (
        "of another input",
        "evaluate run --data labelled.npz",
        "(8, 3, 8, 8)",
        record("model.spec.input_size", [3, 9, 9]),
    ),
    ("of two means", "evaluate run --data labelled.npz", "0,0", record("model.spec.mean", [0, 0])),
    ("of a deviation of zero", "push run", "0,1,1", record("model.spec.std", [0, 1, 1])),
    ("of a crop beyond the picture", "report run", "1.5", record("model.spec.crop_fraction", 1.5)),
    ("of a wrong interpolation", "report run", "cubist", record("model.spec.interpolation", "cubist")),
    ("of infinite numbers", "report run", "timings", record("timings.capture", float("inf"))),
    *(
        (f"of weights that changed: {k}", call, "000000000000", record("model.sha256", "0" * 64))
        for k, call in enumerate(STARTS)
    ),
    *(
        (f"of a model that was in memory: {k}", call, "made in Python", record("model.source.kind", "memory"))
        for k, call in enumerate(STARTS)
    ),
    (
        "of a model file that is gone",
        "quantize run --out new",
        "gone.py",
        record("model.source.name", "gone.py:small"),
    ),
    (
        "of weights that are gone",
        "quantize run --out new",
        "gone.pt",
        record("model.source.weights", "/gone.pt"),
    ),
)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of everything in a record."""
    if path:
        yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from leaves(inner, (*path, key))


def test_fuzzed_records(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever single place of run.json is missing or wrong: a command does its work or refuses the run."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    good = json.loads((tmp_path / "run/run.json").read_text())
    rng = random.Random(0)
    values: list[Any] = [
        DELETE,
        None,
        True,
        -1,
        10**30,
        0.5,
        float("nan"),
        "",
        "\x1b[31m\n\nx",
        [],
        [[]],
        {},
        {"a": {}},
    ]
    refused = 0
    for path in leaves(good):
        bad = copy.deepcopy(good)
        owner = bad
        for part in path[:-1]:
            owner = owner[part]
        value = rng.choice(values)
        if value is DELETE:
            del owner[path[-1]]
        else:
            owner[path[-1]] = value
        (tmp_path / "run/run.json").write_text(json.dumps(bad))
        before = snapshot(tmp_path)
        call = rng.choice(
            ("evaluate run --data labelled.npz", "report run --out page.html", "push run --out others")
        )
        code, err = run_command(call.split())
        assert code in (0, 2), (path, value, call, err)
        if code == 2:
            one_paragraph(err)
            assert snapshot(tmp_path) == before, (path, value, call)
            refused += 1
        (tmp_path / "page.html").unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "others", ignore_errors=True)
    assert refused > 30


@pytest.mark.parametrize("case", RECORDS)
def test_records(case: Case, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, place, tmp_path, monkeypatch)
