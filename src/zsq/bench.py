"""`zsq bench FILE.toml`: networks x recipes x bits x seeds -> table, resumable at any instant."""

import copy
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from zsq._version import __version__
from zsq.bench_table import MARK, NetworkResults, summarise, to_markdown
from zsq.data import Dataset, check_labels, load_images, open_dataset
from zsq.errors import JobError, UsageError, ZsqError
from zsq.evaluate import CHUNK, accuracy
from zsq.images.settings import Synthesis
from zsq.models import ModelSource, Teacher, load_model
from zsq.pipeline import compose_recipe, quantize, synthesize_images
from zsq.progress import Callback, Progress
from zsq.recipe import GivenImages, Recipe, describe, flat
from zsq.run import load_run, read_record, write_atomic

ROWS, FLOAT, WORK, IMAGES, TABLE, RESULTS = (
    "rows.jsonl",
    "float.json",
    "work",
    "images",
    "table.md",
    "results.json",
)
Say = Callable[[str], None]
Cell = tuple[str, str, int]  # label, bits, seed


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of a benchmark file; paths as they are written there.

    Attributes:
        name: heading of its table.
        model, weights, input_size, mean, std: as for `load_model`.
        data: labelled images for the accuracy.
        images: images for recipes that need some; None if there are none.
        bits: columns of its table.
        set: settings of every recipe that has them.
    """

    name: str
    model: str
    weights: str | None = None
    input_size: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    data: str
    images: str | None = None
    bits: tuple[str, ...] = ()
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recipe of a benchmark file; `label` is its name in the table, `images` says that it is given some."""

    name: str
    label: str
    set: dict[str, Any] = field(default_factory=dict)
    images: bool = False


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark file."""

    name: str
    budget: str
    ends: str
    seeds: tuple[int, ...]
    device: str
    set: dict[str, Any]
    networks: tuple[Network, ...]
    recipes: tuple[Entry, ...]


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
        return _digest(self.definition)


@dataclass(kw_only=True)
class Plan:
    """A network, loaded and checked, with its jobs and what is known of them.

    Attributes:
        dataset: its labelled images.
        given: its `images`, (N, C, H, W), normalised, while they are needed.
        float_key: hash of what the float network's accuracy depends on.
        rows, failures: finished rows and error texts.
    """

    network: Network
    teacher: Teacher
    dataset: Dataset
    jobs: list[Job]
    float_key: str
    given: Tensor | None = None
    rows: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    failures: dict[Cell, str] = field(default_factory=dict)


def run_bench(
    path: str | Path, *, out: str | Path | None = None, write: str | Path | None = None, progress: Say
) -> Path:
    """Fill the table of a benchmark file, row by row; rows that an earlier call finished are not done again.

    A row is done again if what it depends on has changed: its settings, weights or data. An interrupted row
    goes on from its last finished piece. Synthetic images are made once for all bits. A row that fails is
    noted, and the next one is done.

    Args:
        path: the benchmark file.
        out: folder for rows, images and the table; None means runs/bench-NAME.
        write: also write the Markdown table there.
        progress: called with one line for every step that is worth showing.

    Returns:
        The folder, with rows.jsonl, table.md and results.json.

    Raises:
        UsageError: the file, or a path or setting in it, is wrong (nothing was computed).
        JobError: some rows failed; all others are done.
    """
    bench = read_bench(Path(path))
    folder = Path(out) if out is not None else Path("runs") / f"bench-{bench.name}"
    copy_at = Path(write) if write is not None else None
    _check_outputs(folder, copy_at)
    plans = [_plan(bench, network) for network in bench.networks]
    for leftover in (*folder.glob(".*.????????"), *(folder / IMAGES).glob(".*.????????")):
        leftover.unlink(missing_ok=True)  # of a killed write
    finished, floats = _read_rows(folder / ROWS), _read_json(folder / FLOAT)
    for plan in plans:
        plan.rows = {job.cell: finished[job.key] for job in plan.jobs if job.key in finished}
    command = ["zsq", "bench", str(path), *(["--out", str(out)] if out is not None else [])]
    command += ["--write", str(write)] if write is not None else []
    header = _header(bench, shlex.join(command))
    total, done = sum(len(plan.jobs) for plan in plans), sum(len(plan.rows) for plan in plans)
    progress(f"{bench.name}: {total} rows, {done} of them finished before")

    def tabulate() -> None:
        summary = summarise(header, [_results(bench, plan, floats.get(plan.float_key)) for plan in plans])
        write_atomic(folder / RESULTS, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
        for file in (folder / TABLE, copy_at):
            if file is not None:
                write_atomic(file, to_markdown(summary).encode())

    tabulate()
    for plan in plans:
        pending = [job for job in plan.jobs if job.cell not in plan.rows]
        if pending and plan.float_key not in floats:
            progress(f"{plan.network.name}: evaluating the float network")
            floats[plan.float_key] = _measure(plan.teacher.module, plan, bench.device)
            write_atomic(folder / FLOAT, (json.dumps(floats, indent=2) + "\n").encode())
        for job in pending:
            done += 1
            label, bits, seed = job.cell
            title = f"[{done} of {total}] {plan.network.name}, {label}, {bits}, seed {seed}"
            try:
                row = _row(job, plan, bench.device, folder, floats[plan.float_key], title, progress)
            except ZsqError as error:
                plan.failures[job.cell] = str(error)
                progress(f"{title}: failed: {error}")
            else:
                _append(folder / ROWS, row)
                plan.rows[job.cell] = row
                shutil.rmtree(_work_folder(folder, job, plan), ignore_errors=True)
                progress(f"{title}: top-1 {row['top1']:.2f} % (float {row['float']['top1']:.2f} %)")
            tabulate()
        plan.given = None
    failed = sum(len(plan.failures) for plan in plans)
    if failed:
        raise JobError(
            f"{failed} of {total} rows failed; {folder / TABLE} says why. The other rows are done. The same "
            "command tries the failed ones again."
        )
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return folder


# Reading the file.


def read_bench(path: Path) -> Bench:
    """Read a benchmark file and check its form; paths and settings are checked when the rows are planned.

    Raises:
        UsageError: it is missing or not TOML, or has an unknown key, lacks one, or has one of another type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The benchmark file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"The benchmark file {path} is not valid TOML: {error}.") from error
    top = _Fields(content, str(path))
    shared_bits = top.take("bits", TEXTS, [])
    bench = Bench(
        name=top.take("name", TEXT, path.stem),
        budget=top.take("budget", TEXT, "standard"),
        ends=top.take("ends", TEXT, "8bit"),
        seeds=tuple(top.take("seeds", COUNTS, [0])),
        device=top.take("device", TEXT, "cpu"),
        set=top.settings(),
        networks=tuple(
            _network(_Fields(table, f"{path}, [[networks]] number {k}"), shared_bits)
            for k, table in enumerate(top.take("networks", TABLES), 1)
        ),
        recipes=tuple(
            _entry(_Fields(table, f"{path}, [[recipes]] number {k}"))
            for k, table in enumerate(top.take("recipes", TABLES), 1)
        ),
    )
    top.refuse_others()
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", bench.name):
        raise UsageError(
            f"{path}: name is {bench.name!r}. Expected letters, digits, dots and dashes; it names the output "
            "folder."
        )
    _check_device(bench.device, path)
    many: list[tuple[str, list[Any]]] = [
        ("names of networks", [network.name for network in bench.networks]),
        ("labels of recipes", [entry.label for entry in bench.recipes]),
        ("seeds", list(bench.seeds)),
        *((f"bits of {network.name}", list(network.bits)) for network in bench.networks),
    ]
    for what, values in many:
        if len(set(values)) < len(values):
            raise UsageError(f"{path}: the {what} are not all different: {', '.join(map(str, values))}.")
    return bench


def _check_device(device: str, path: Path) -> None:
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise UsageError(f'{path}: device is {device!r}. Expected "cpu", "cuda" or "cuda:1".')
    if device != "cpu" and int(match.group(1) or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"{path}: device is {device!r}, but PyTorch finds {torch.cuda.device_count()} CUDA devices. Give "
            'device = "cpu".'
        )


def _network(at: "_Fields", shared_bits: list[str]) -> Network:
    bits = at.take("bits", TEXTS, shared_bits)
    if not bits:
        raise UsageError(f'{at.where} has no bits. Give bits = ["W4A4"] there, or once for all networks.')
    size, mean, std = (at.take(key, kind, None) for key, kind in _INPUT)
    network = Network(
        name=at.take("name", TEXT),
        model=at.take("model", TEXT),
        weights=at.take("weights", TEXT, None),
        input_size=tuple(size) if size is not None else None,
        mean=tuple(mean) if mean is not None else None,
        std=tuple(std) if std is not None else None,
        data=at.take("data", TEXT),
        images=at.take("images", TEXT, None),
        bits=tuple(text.strip().upper() for text in bits),
        set=at.settings(),
    )
    at.refuse_others()
    return network


def _entry(at: "_Fields") -> Entry:
    name = at.take("name", TEXT)
    label, images = at.take("label", TEXT, name), at.take("images", FLAG, False)
    entry = Entry(name=name, label=label, images=images, set=at.settings())
    at.refuse_others()
    return entry


def _list_of(kind: type | tuple[type, ...]) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        right = isinstance(value, list) and all(
            isinstance(v, kind) and not isinstance(v, bool) for v in value
        )
        return right and len(value) > 0

    return fits


Kind = tuple[str, Callable[[Any], bool]]  # what to call it in a message, and the check
TEXT: Kind = ("a text", lambda value: isinstance(value, str) and value != "")
FLAG: Kind = ("true or false", lambda value: isinstance(value, bool))
TEXTS: Kind = ("a list of texts", _list_of(str))
NUMBERS: Kind = ("a list of numbers", _list_of((int, float)))
COUNTS: Kind = (
    "a list of whole numbers that are not negative",
    lambda value: _list_of(int)(value) and min(value) >= 0,
)
TABLES: Kind = ("one or more tables in double brackets", _list_of(dict))
SETTINGS: Kind = ("a table of settings", lambda value: isinstance(value, dict))
_INPUT = (("input_size", COUNTS), ("mean", NUMBERS), ("std", NUMBERS))
_REQUIRED = object()


class _Fields:
    """One table of a benchmark file: fields are taken with a check of their type, others are errors."""

    def __init__(self, table: dict[str, Any], where: str) -> None:
        self.table, self.where = table, where
        self.known: list[str] = []

    def take(self, key: str, kind: Kind, default: Any = _REQUIRED) -> Any:
        """The value of `key`, or `default`."""
        self.known.append(key)
        expected, fits = kind
        if key not in self.table:
            if default is _REQUIRED:
                raise UsageError(f"{self.where} has no {key!r}. Expected {expected}.")
            return default
        if not fits(self.table[key]):
            raise UsageError(f"{self.where}: {key} is {self.table[key]!r}. Expected {expected}.")
        return self.table[key]

    def settings(self) -> dict[str, Any]:
        """`set` by dotted name; `synthesis.steps = 300` without quotes, a table in TOML, means the same."""
        found = dict(_flattened(self.take("set", SETTINGS, {})))
        for name, value in found.items():
            if not isinstance(value, (str, int, float)):
                raise UsageError(
                    f"{self.where}: setting {name!r} is {value!r}. Expected a text, a number, true or false."
                )
            if name in ("name", "paper") or name.startswith("scheme."):
                raise UsageError(
                    f"{self.where}: {name!r} cannot be set here. Bits and ends of a benchmark are its keys "
                    "bits and ends."
                )
        return found

    def refuse_others(self) -> None:
        """Complain about keys that were not taken."""
        unknown = [key for key in self.table if key not in self.known]
        if unknown:
            raise UsageError(
                f"{self.where} has unknown keys: {', '.join(unknown)}. Known there: {', '.join(self.known)}."
            )


def _flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _expanded(text: str, what: str) -> str:
    """`text` with every ${VARIABLE} from the environment."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            after = text[match.end() :].lstrip("/") or "it"
            raise UsageError(
                f"The {what} is {text}, but the environment variable {name} is not set. Set it to the folder "
                f"that holds {after}: export {name}=/path/to/folder."
            )
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _existing(text: str | None, what: str) -> Path | None:
    if text is None:
        return None
    path = Path(_expanded(text, what)).expanduser()
    if not path.exists():
        raise UsageError(f"The {what} is {text}, but {path} does not exist. Correct the path.")
    return path


# Planning: everything that can be wrong is found here, before anything is computed.


def _plan(bench: Bench, network: Network) -> Plan:
    of = f"of {network.name}"
    teacher = load_model(
        _expanded(network.model, f"model {of}"),
        weights=_existing(network.weights, f"weights {of}"),
        input_size=network.input_size,
        mean=network.mean,
        std=network.std,
    )
    # Files may move between two calls; the weights are known by their hash.
    teacher.name, teacher.source = network.name, ModelSource(kind="memory", name=network.name)
    data, images = _existing(network.data, f"data {of}"), _existing(network.images, f"images {of}")
    assert data is not None
    if len(teacher.output_shape) != 1:
        raise UsageError(
            f"The output of {network.name} has shape {teacher.output_shape} for an image. Expected a "
            "classifier, which has one number a class."
        )
    dataset = open_dataset(data, teacher.spec)
    check_labels(dataset, teacher.output_shape[0])
    # Weights alone do not tell networks apart that differ in code only, hence the name.
    model_hash = _digest([network.model.rpartition("/")[2], teacher.sha256])
    measured = {"model": model_hash, "spec": asdict(teacher.spec), "data": _content_hash(data)}
    images_hash = _content_hash(images) if images is not None else None
    jobs = []
    for entry, overrides in _overrides(bench, network):
        for bits in network.bits:
            settings = compose_recipe(
                entry.name,
                bits=bits,
                ends=bench.ends,
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
    return Plan(network=network, teacher=teacher, dataset=dataset, jobs=jobs, float_key=_digest(measured))


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


def _check_outputs(folder: Path, copy_at: Path | None) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RESULTS).exists()):
        raise UsageError(
            f"The output {folder} exists and is not the folder of a benchmark; nothing in it was changed. "
            "Choose another --out."
        )
    if copy_at is not None and copy_at.exists():
        if not copy_at.is_file() or MARK not in copy_at.read_text(encoding="utf-8", errors="replace"):
            raise UsageError(
                f"{copy_at} exists and was not written by `zsq bench`; nothing in it was changed. Choose "
                "another --write."
            )


# One row.


def _row(
    job: Job,
    plan: Plan,
    device: str,
    folder: Path,
    float_accuracy: Mapping[str, Any],
    title: str,
    say: Say,
) -> dict[str, Any]:
    label, bits, seed = job.cell
    images, made, seconds = None, None, None
    if isinstance(job.settings.synthesis, Synthesis):
        made, seconds = _synthetic_images(job, job.settings.synthesis, plan, device, folder, title, say)
    elif isinstance(job.settings.synthesis, GivenImages):
        images = _given_images(plan)
    work = _work_folder(folder, job, plan)
    status = _status(work)
    if status == "done":
        run = load_run(work)
    else:
        run = quantize(
            plan.teacher,
            recipe=job.settings,
            budget="paper",
            images=images,
            made=made,
            seed=seed,
            device=device,
            out=work,
            progress=_rarely(say, title),
        )
    timings: dict[str, float | None] = dict(run.record["timings"])
    if status == "running":  # the time before the interruption is not known
        timings = dict.fromkeys(timings)
    if isinstance(job.settings.synthesis, Synthesis):
        timings["synthesize"] = seconds
    started = time.perf_counter()
    measured = _measure(run.student, plan, device)
    timings["evaluate"] = round(time.perf_counter() - started, 3)
    estimates = run.record["results"]["estimated_without_data"]
    kind = "holdout" if "holdout" in estimates else "calibration_images"
    return {
        "network": plan.network.name,
        "recipe": label,
        "bits": bits,
        "seed": seed,
        **measured,
        "float": dict(float_accuracy),
        "agreement": {"on": kind, **estimates[kind]},
        "seconds": timings,
        "settings_sha256": _digest(job.definition["settings"]),
        "model_sha256": plan.teacher.sha256,
        "data_sha256": job.definition["data"],
        "key": job.key,
        "versions": _versions(),
        "machine": _machine(device),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _measure(model: nn.Module, plan: Plan, device: str) -> dict[str, Any]:
    """Accuracy on the network's labelled images: "top1", "top5" and "num_images"."""
    model = model if device == "cpu" else copy.deepcopy(model).to(device)
    return accuracy(model, plan.dataset.batches(CHUNK), device=device).to_json()


def _given_images(plan: Plan) -> Tensor:
    """All images of the network's `images`; the recipe says how many of them are drawn."""
    if plan.given is None:
        path = _existing(plan.network.images, f"images of {plan.network.name}")
        assert path is not None
        plan.given = load_images(path, plan.teacher.spec)
    return plan.given


def _synthetic_images(
    job: Job, settings: Synthesis, plan: Plan, device: str, folder: Path, title: str, say: Say
) -> tuple[Tensor, float | None]:
    """Images of a network, settings and a seed, made once, then read; and the seconds they took."""
    kind = torch.device(device).type
    teacher, seed = plan.teacher, job.cell[2]
    key = _digest([job.definition["model"], teacher.spec.input_size, asdict(settings), seed, kind])
    file, about = folder / IMAGES / f"{key}.safetensors", folder / IMAGES / f"{key}.json"
    try:
        return load_safetensors(file.read_bytes())["images"], json.loads(about.read_text())["seconds"]
    except (OSError, ValueError, KeyError, SafetensorError):
        pass
    work = folder / WORK / f"images-{_digest([key, teacher.name, _versions()])}"
    resumed = _status(work) == "running"
    started = time.perf_counter()
    images = synthesize_images(
        teacher,
        recipe=Recipe(name="images", paper="", synthesis=settings),
        budget="paper",
        seed=seed,
        device=device,
        out=work,
        progress=_rarely(say, title),
    )
    seconds = None if resumed else round(time.perf_counter() - started, 3)
    write_atomic(about, json.dumps({"seconds": seconds, "seed": seed, **asdict(settings)}).encode())
    write_atomic(file, save_safetensors({"images": images.contiguous()}))
    shutil.rmtree(work, ignore_errors=True)
    return images, seconds


def _work_folder(folder: Path, job: Job, plan: Plan) -> Path:
    """Where a running row keeps its pieces; other versions, which cannot continue it, have another."""
    return folder / WORK / _digest([job.definition, describe(job.settings), plan.network.name, _versions()])


def _status(work: Path) -> str | None:
    """ "running", "done", or None, for which whatever is left in the folder is removed."""
    try:
        return str(read_record(work)["status"])
    except (UsageError, KeyError):
        shutil.rmtree(work, ignore_errors=True)
        return None


def _rarely(say: Say, title: str) -> Callback:
    """A line of progress at most twice a minute."""
    last = time.monotonic()

    def progress(event: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= 30:
            last = time.monotonic()
            say(f"{title}: {event.stage} {event.item}, {event.done} of {event.total}")

    return progress


def _versions() -> dict[str, str]:
    return {
        "zsq": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _machine(device: str) -> str:
    """Model of the processor and number of cores, and of the accelerator if it is used; no names of hosts."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    except OSError:
        pass
    text = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device)}; {text}" if device.startswith("cuda") else text


# The folder.


def _header(bench: Bench, command: str) -> dict[str, Any]:
    settings = {
        "budget": bench.budget,
        "ends": bench.ends,
        "seeds": list(bench.seeds),
        "device": bench.device,
    }
    recipes = {
        entry.label: {"uses": entry.name, **entry.set, **({"images": "given"} if entry.images else {})}
        for entry in bench.recipes
    }
    return {
        "format": 1,
        "name": bench.name,
        "command": command,
        "settings": settings | bench.set,
        "recipes": recipes,
    }


def _results(bench: Bench, plan: Plan, float_accuracy: Mapping[str, Any] | None) -> NetworkResults:
    network = plan.network
    about = {key: getattr(network, key) for key in ("model", "weights", "data", "images")}
    return NetworkResults(
        name=network.name,
        settings={key: value for key, value in about.items() if value is not None} | network.set,
        recipes=[entry.label for entry in bench.recipes],
        bits=network.bits,
        seeds=bench.seeds,
        float_accuracy=float_accuracy,
        rows=plan.rows,
        failures=plan.failures,
    )


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Finished rows by key; lines that are damaged count as not finished, and the last of a key holds."""
    rows = {}
    needed = {"key", "top1", "seconds", "versions", "machine", "finished"}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and needed <= row.keys():
            rows[row["key"]] = row
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    before = path.read_bytes() if path.exists() else b""
    before += b"" if before.endswith(b"\n") or not before else b"\n"  # after a damaged line
    write_atomic(path, before + json.dumps(row, allow_nan=False).encode() + b"\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _content_hash(path: Path) -> str:
    """sha256 of a file; of a folder, that of names and sizes, as reading all of it would take too long."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return _digest([[p.relative_to(path).as_posix(), p.stat().st_size] for p in files])
