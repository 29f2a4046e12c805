"""A run killed at any instant goes on with the same command and ends with the same bits.

`ZSQ_KILLS=50 pytest tests/test_kills.py` (make test-kills) makes so many kills, of every
family the same number; without it one of each but those whose stages others have.
"""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import LOG, Server

KILLS = int(os.environ.get("ZSQ_KILLS", "0"))
BATCHES = {"synthesis.num_images": 24, "synthesis.batch_size": 8, "num_holdout": 4}
LATENTS = {**BATCHES, "synthesis.steps": 12, "synthesis.latent_size": 8}
UNITS = {"reconstruction.steps": 40, "reconstruction.batch_size": 8}
EPOCHS = {"fine_tuning.epochs": 4, "fine_tuning.iterations": 5, "fine_tuning.batch_size": 8}
REFINED = {
    **LATENTS,
    **UNITS,
    "refinement.steps": 4,
    "refinement.warmup_steps": 10,
    "refinement.bank_size": 8,
}
SMALL, ATTENDS = "quantize NETS:small", "quantize NETS:attends"
# Of every kind of stage one: how images are made, how a student learns, what else a command does.
FAMILIES: dict[str, tuple[str, dict[str, int]]] = {
    "genie": (SMALL, {**LATENTS, **UNITS}),
    "sadag": (SMALL, REFINED),
    "synq": (SMALL, {**BATCHES, **EPOCHS, "synthesis.steps": 20, "synthesis.centres.steps": 15}),
    "hast": (SMALL, {**BATCHES, **EPOCHS, "synthesis.steps": 20}),
    "gdfq": (SMALL, {**BATCHES, **EPOCHS, "synthesis.steps": 20}),
    "texq": (SMALL, {**BATCHES, **EPOCHS, "synthesis.steps": 10, "synthesis.centres.steps": 15}),
    "dfq": (SMALL + " --data DATA", {"synthesis.num_images": 24}),
    "psaq_vit": (ATTENDS, {**BATCHES, **UNITS, "synthesis.steps": 15}),
    "genie, given images in files": (SMALL + " --images DATA --memory 10kB", UNITS),
    "sadag, only images": (SMALL.replace("quantize", "synthesize"), REFINED),
}


@dataclass
class Family:
    """A command, and what came of it undisturbed.

    Attributes:
        arguments: of the command.
        folder: where its runs are.
        seconds: that the undisturbed one took.
        stages: when its stages began, in seconds.
        results: see `results`.
    """

    arguments: list[str]
    folder: Path
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    levels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "data.npz", images=levels, labels=np.arange(24) % 6)
    found = Server(folder)
    yield found
    found.close()


def arguments_of(name: str, server: Server) -> list[str]:
    call, settings = FAMILIES[name]
    call = call.replace("NETS", str(server.nets)).replace("DATA", str(server.nets.parent / "data.npz"))
    recipe = ["--recipe", name.partition(",")[0], "--bits", "W3A3", "--input-size", "3,8,8", "--out", "run"]
    return [
        *call.split(),
        *recipe,
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
    ]


def results(folder: Path) -> dict[str, Any]:
    """All files of a run but its log of steps, and its record without times."""
    found: dict[str, Any] = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    found.pop("metrics.jsonl", None)
    if "run.json" in found:
        record = json.loads(found["run.json"])
        del record["timings"]
        found["run.json"] = record
    assert not (folder / "state").exists() and not [name for name in found if name.startswith(".")]
    return found


def undisturbed(name: str, server: Server, folder: Path) -> Family:
    family = Family(arguments_of(name, server), folder)
    done = server.call(folder / "whole", family.arguments)
    assert done["code"] == 0, (folder / "whole" / LOG).read_text()
    family.seconds, family.stages = done["seconds"], done["stages"]
    family.results = results(folder / "whole/run")
    return family


def instant(family: Family, number: int, rng: random.Random) -> dict[str, Any]:
    """When to kill: in turns in each of the stages, while a file is written, and anywhere."""
    begins = [*family.stages.values(), family.seconds]
    kinds = [*range(len(family.stages)), "write", "anywhere"]
    kind = kinds[number % len(kinds)]
    if kind == "write":
        return {"write": rng.randint(1, 8)}
    if isinstance(kind, int):
        return {
            "stage": list(family.stages)[kind],
            "seconds": rng.random() * (begins[kind + 1] - begins[kind]),
        }
    first = 0.8 * begins[0]  # before that nothing is written
    return {"seconds": first + rng.random() * (family.seconds - first)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if KILLS or name not in ("hast", "texq")])
def test_killed_at_any_instant(name: str, server: Server, tmp_path: Path) -> None:
    index = list(FAMILIES).index(name)
    wanted = max(1, -(-KILLS // len(FAMILIES)))
    rng = random.Random(index)
    family = undisturbed(name, server, tmp_path)
    kills, trial = 0, 0
    where: list[dict[str, Any]] = []
    while kills < wanted or (KILLS and not set(family.stages) <= {at.get("stage") for at in where}):
        trial += 1
        assert trial < 20 + 4 * wanted, "the runs end before they are killed"
        out = tmp_path / f"trial-{trial}"
        at: dict[str, Any] = {**instant(family, index + trial, rng)}
        killed = server.call(out, family.arguments, **at)["killed"]
        if killed and rng.random() < 0.3:  # and once more
            again = server.call(out, family.arguments, seconds=rng.random() * family.seconds)
            kills += again["killed"]
        if killed:
            kills += 1
            where.append(at)
        if (
            "run.json" not in family.results
            and not (out / "run/run.json").exists()
            and (out / "run/images.png").exists()
        ):
            done = {"code": 0}  # killed after the last thing that it does
        else:
            done = server.call(out, family.arguments)
        assert done["code"] == 0, (at, (out / LOG).read_text())
        assert results(out / "run") == family.results, at
    print(f"{name}: {kills} kills, {where}")
