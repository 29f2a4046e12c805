"""Planning a benchmark: everything that can be wrong is found here, before anything is computed."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsq.bench_file import Bench, Entry, Network, existing_path, expanded
from zsq.data import Dataset, check_labels, open_dataset
from zsq.errors import UsageError
from zsq.models import ModelSource, Teacher, load_model
from zsq.pipeline import compose_recipe
from zsq.recipe import GivenImages, Recipe
from zsq.recipe_fields import describe, flat

Cell = tuple[str, str, int]  # label, bits, seed


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row to come: a network under one recipe, at some bits, with one seed.

    Attributes:
        cell: label, bits and seed.
        settings: the recipe with everything replaced.
        definition: all that the result depends on but for versions; JSON.
    """

    cell: Cell
    settings: Recipe
    definition: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash of the definition; a finished row of this key is this job's."""
        return digest(self.definition)


@dataclass(kw_only=True)
class Plan:
    """A network, loaded and checked, with its jobs and what is known of them.

    Attributes:
        dataset: its labelled images.
        given: its `images`, (N, C, H, W), normalised, with their labels (N,) if known, while they are needed.
        diagnostics: labelled images for the figures of `diagnose`; 0 for none.
        float_key: hash of what the float network's accuracy depends on.
        rows, failures: finished rows and error texts.
    """

    network: Network
    teacher: Teacher
    dataset: Dataset
    jobs: list[Job]
    diagnostics: int
    float_key: str
    given: tuple[Tensor, Tensor | None] | None = None
    rows: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    failures: dict[Cell, str] = field(default_factory=dict)


def plan_network(bench: Bench, network: Network) -> Plan:
    of = f"of {network.name}"
    teacher = load_model(
        expanded(network.model, f"model {of}"),
        weights=existing_path(network.weights, f"weights {of}"),
        input_size=network.input_size,
        mean=network.mean,
        std=network.std,
    )
    # Files may move between two calls; the weights are known by their hash.
    teacher.name, teacher.source = network.name, ModelSource(kind="memory", name=network.name)
    data, images = existing_path(network.data, f"data {of}"), existing_path(network.images, f"images {of}")
    assert data is not None
    if len(teacher.output_shape) != 1:
        raise UsageError(
            f"The output of {network.name} has shape {teacher.output_shape} for an image. Expected a "
            "classifier, which has one number a class."
        )
    dataset = open_dataset(data, teacher.spec)
    check_labels(dataset, teacher.output_shape[0])
    # Weights alone do not tell networks apart that differ in code only, hence the name.
    model_hash = digest([network.model.rpartition("/")[2], teacher.sha256])
    measured = {"model": model_hash, "spec": asdict(teacher.spec), "data": _content_hash(data)}
    images_hash = _content_hash(images) if images is not None else None
    jobs = []
    for entry, overrides in _overrides(bench, network):
        for bits in network.bits:
            settings = compose_recipe(
                entry.name,
                bits=bits,
                ends=bench.ends,
                placement=entry.placement,
                budget=bench.budget,
                overrides=overrides,
                input_size=teacher.spec.input_size,
            )
            given = isinstance(settings.synthesis, GivenImages)
            if given != entry.images:
                kind = "needs given images" if given else "makes its own images"
                raise UsageError(
                    f"The recipe {entry.label!r} {kind}. Expected images = {str(given).lower()} in its "
                    "[[recipes]] table."
                )
            if given and images is None:
                raise UsageError(
                    f"The recipe {entry.label!r} needs images, and the network {network.name} has none. Give "
                    'the network images = "PATH", or leave the recipe out.'
                )
            described = {k: v for k, v in describe(settings).items() if k not in ("name", "paper")}
            definition: dict[str, Any] = {**measured, "settings": described}
            definition["device"] = torch.device(bench.device).type
            definition["images"] = images_hash if given else None
            jobs += [
                Job(
                    cell=(entry.label, bits, seed), settings=settings, definition={**definition, "seed": seed}
                )
                for seed in bench.seeds
            ]
    return Plan(
        network=network,
        teacher=teacher,
        dataset=dataset,
        jobs=jobs,
        diagnostics=bench.diagnostics,
        float_key=digest(measured),
    )


def _overrides(bench: Bench, network: Network) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Every recipe with its settings: shared ones as far as the recipe has them, then its own."""
    shared = {**bench.set, **network.set}
    unused = set(shared)
    for entry in bench.recipes:
        known = flat(compose_recipe(entry.name, budget=bench.budget))
        applied = {name: value for name, value in shared.items() if name in known}
        unused -= applied.keys()
        yield entry, {**applied, **entry.set}
    if unused:
        raise UsageError(
            f"No recipe of the benchmark has the setting {', '.join(sorted(unused))}. `zsq show RECIPE` "
            "lists the settings of a recipe."
        )


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _content_hash(path: Path) -> str:
    """sha256 of a file; of a folder, that of names and sizes, as reading all of it would take too long."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return digest([[p.relative_to(path).as_posix(), p.stat().st_size] for p in files])
