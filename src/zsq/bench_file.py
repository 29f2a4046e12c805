"""The file of a benchmark: networks, recipes, bits and seeds, read from TOML and checked."""

import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zsq.errors import UsageError
from zsq.paths import user_path


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
    placement: str | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark file.

    `diagnostics` is the number of labelled images on which every row also has the figures of `zsq.diagnose`.
    """

    name: str
    budget: str
    ends: str
    seeds: tuple[int, ...]
    device: str
    diagnostics: int
    set: dict[str, Any]
    networks: tuple[Network, ...]
    recipes: tuple[Entry, ...]


def read_bench(path: Path) -> Bench:
    """Read a benchmark file and check its form; paths and settings are checked when the rows are planned.

    Raises:
        UsageError: it is missing or not TOML, or has an unknown key, lacks one, or has one of another type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"The benchmark file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The benchmark file {path} is not valid TOML: {error}.") from error
    top = _Fields(content, str(path))
    shared_bits = top.take("bits", TEXTS, [])
    bench = Bench(
        name=top.take("name", TEXT, path.stem),
        budget=top.take("budget", TEXT, "standard"),
        ends=top.take("ends", TEXT, "8bit"),
        seeds=tuple(top.take("seeds", COUNTS, [0])),
        device=top.take("device", TEXT, "cpu"),
        diagnostics=top.take("diagnostics", COUNT, 0),
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
    placement = at.take("placement", TEXT, None)
    entry = Entry(name=name, label=label, images=images, placement=placement, set=at.settings())
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
COUNT: Kind = ("a whole number that is not negative", lambda value: _list_of(int)([value]) and value >= 0)
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
                    "bits and ends, placement is one of a [[recipes]] table."
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


def expanded(text: str, what: str) -> str:
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


def existing_path(text: str | None, what: str) -> Path | None:
    if text is None:
        return None
    path = user_path(expanded(text, what), what)
    if not path.exists():
        raise UsageError(f"The {what} is {text}, but {path} does not exist. Correct the path.")
    return path
