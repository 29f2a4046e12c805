"""Arguments that several commands share: the options, and what their texts stand for."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsq.cli.call import call
from zsq.cli.terminal import say
from zsq.errors import UsageError

if TYPE_CHECKING:
    from zsq.distributed import Group
    from zsq.teacher import Teacher

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="digits, a timm name, path/to/file.py:factory, or a run folder")
]
RecipeOption = Annotated[str, typer.Option(metavar="RECIPE", help="method, one of `zsq recipes`")]
BitsOption = Annotated[str, typer.Option(metavar="BITS", help="W4A4, W2A4, W8A8 ..., or W4: weights only")]
EndsOption = Annotated[
    str | None,
    typer.Option(metavar="8bit|same", help="first and last layer in 8 bits, or in the same bits as the rest"),
]
PlacementOption = Annotated[
    str | None,
    typer.Option(
        metavar="research|engine",
        help="which activations are quantized: inputs of layers, or all that an engine needs to compute in "
        "integers",
    ),
]
BudgetOption = Annotated[
    str,
    typer.Option(
        metavar="quick|standard|paper", help="images and steps together; paper: the published counts"
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="replace one setting of `zsq show RECIPE`; can be repeated"
    ),
]
FilterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="METHOD:N",
        help="keep N of the images: gradient_cover:256, energy, bn_sensitivity, patch_entropy or random; "
        "repeated, each filters what the one before kept",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, metavar="N", help="all randomness follows from it")]
DeviceOption = Annotated[str, typer.Option(metavar="cpu|cuda", help="where to compute")]
ForceOption = Annotated[bool, typer.Option("--force", help="replace an earlier run in --out")]
WeightsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="weights of MODEL: .safetensors, .pt or .pth")
]
InputSizeOption = Annotated[
    str | None, typer.Option(metavar="C,H,W", help="channels, height, width, e.g. 3,32,32")
]
MeanOption = Annotated[
    str | None, typer.Option(metavar="A,B,C", help="mean of each channel, for pixels in [0, 1]")
]
StdOption = Annotated[
    str | None, typer.Option(metavar="A,B,C", help="deviation of each channel, for pixels in [0, 1]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON on stdout and nothing else there")]


def _turn_on_debug(value: bool) -> bool:
    call.debug |= value
    return value


DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_turn_on_debug, help="show the traceback of an error")
]


def read_settings(texts: Sequence[str] | None) -> dict[str, str]:
    """["synthesis.steps=500"] -> {"synthesis.steps": "500"}.

    Raises:
        UsageError: a text without key, "=" or value.
    """
    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise UsageError(f"--set takes KEY=VALUE, for example --set synthesis.steps=500; got {text!r}.")
        found[key.strip()] = value.strip()
    return found


def read_filters(texts: Sequence[str] | None) -> dict[str, str]:
    """["energy:512", "random:256"] -> the settings that put these filters into a recipe, one after another.

    Raises:
        UsageError: not a name and a whole number.
    """
    found: dict[str, str] = {}
    place = "filter"
    for text in texts or ():
        method, _, count = text.partition(":")
        if not method.strip() or not count.strip().isdigit():
            raise UsageError(
                f"--filter takes METHOD:N, for example --filter gradient_cover:256; got {text!r}."
            )
        found |= {place: "on", f"{place}.method": method.strip(), f"{place}.keep": count.strip()}
        place += ".then"
    return found


def read_numbers(text: str | None, option: str, kind: type[int] | type[float]) -> tuple[Any, ...] | None:
    """Numbers between commas or spaces; None stays None.

    Raises:
        UsageError: something else is between them.
    """
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in re.split(r"[,\s]+", text.strip(" ,")))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(
            f"{option} takes {what} between commas, for example 3,32,32; got {text!r}."
        ) from None


def read_input_size(text: str | None) -> tuple[int, int, int] | None:
    """Channels, height and width; None stays None.

    Raises:
        UsageError: not three positive whole numbers.
    """
    numbers = read_numbers(text, "--input-size", int)
    if numbers is None:
        return None
    if len(numbers) != 3 or min(numbers) < 1:
        raise UsageError(f"--input-size takes channels, height and width, for example 3,32,32; got {text!r}.")
    channels, height, width = numbers
    return channels, height, width


def read_device(name: str) -> str:
    """A device that is there.

    Raises:
        UsageError: an unknown name, or CUDA without a CUDA device.
    """
    import torch

    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", name)
    if match is None:
        raise UsageError(f"--device is cpu or cuda, got {name!r}.")
    if name != "cpu" and not torch.cuda.is_available():
        raise UsageError(
            f"--device {name} was asked for, but PyTorch finds no CUDA device. Use --device cpu."
        )
    if int(match[1] or 0) >= max(1, torch.cuda.device_count()):
        raise UsageError(
            f"--device {name} was asked for, but PyTorch finds {torch.cuda.device_count()} CUDA devices, "
            "counted from 0."
        )
    return name


@contextmanager
def processes(device: str) -> "Iterator[tuple[Group, str]]":
    """The processes that do the command together, one unless torchrun started several, and this one's device.

    Raises:
        UsageError: as for `read_device`, or there are not as many devices.
        JobError: the processes did not find one another.
    """
    from zsq.distributed import joined, local_device

    target = local_device(read_device(device))
    with joined() as group:
        yield group, target


def is_run(model: str) -> bool:
    """Whether MODEL is a run folder; `digits` always is the bundled network."""
    from zsq.run import is_run_folder

    return model != "digits" and is_run_folder(model)


def read_teacher(
    model: str, weights: Path | None, input_size: str | None, mean: str | None, std: str | None
) -> "Teacher":
    """The model that the options describe, or the teacher of a run folder; what is noteworthy of it is said.

    Raises:
        UsageError: it cannot be loaded, see `load_model` and `teacher_of_run`.
    """
    from zsq.models import load_model

    size, means = read_input_size(input_size), read_numbers(mean, "--mean", float)
    stds = read_numbers(std, "--std", float)
    if not is_run(model):
        teacher = load_model(model, weights=weights, input_size=size, mean=means, std=stds)
    elif size or means or stds:
        raise UsageError(
            f"{model} is a run, which knows its input. Leave out --input-size, --mean and --std."
        )
    else:
        teacher = teacher_of_run(Path(model), weights=weights)
    for note in teacher.notes:
        say(f"Note: {note}")
    return teacher


def teacher_of_run(folder: Path, *, weights: Path | None = None) -> "Teacher":
    """Load the teacher of a run again, as its record says.

    Args:
        folder: of the run.
        weights: where the weights file is now; None means where it was.

    Raises:
        UsageError: it cannot be loaded again, or its weights are others than those that were quantized.
    """
    from zsq.models import load_model
    from zsq.run import read_record

    about: Mapping[str, Any] = read_record(folder)["model"]
    source, spec = about["source"], about["spec"]
    if source["kind"] == "memory":
        raise UsageError(
            f"The teacher of {folder} was made in Python and cannot be loaded again. Name the model itself."
        )
    teacher = load_model(
        source["name"],
        weights=weights or source["weights"],
        input_size=spec["input_size"],
        mean=spec["mean"],
        std=spec["std"],
    )
    if teacher.sha256 != about["sha256"]:
        raise UsageError(
            f"The teacher of {folder} was {source['name']} with weights of sha256 "
            f"{about['sha256'][:12]}..., but now it has {teacher.sha256[:12]}... Give the weights "
            "of then with --weights FILE."
        )
    return teacher


def default_out(parent: str, teacher: "Teacher", recipe: str, bits: str, seed: int) -> Path:
    """runs/digits-genie-W4A4, with the seed where it is not 0."""
    parts = [teacher.name, recipe, bits, f"seed{seed}" if seed else ""]
    return Path(parent) / re.sub(r"[^\w.-]+", "_", "-".join(part for part in parts if part))
