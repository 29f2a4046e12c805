"""Load the model to quantize by name: bundled, from the user's own file, or from timm."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from zsq.architectures import is_file_name, network_from_file, network_from_timm
from zsq.bundled import DIGITS_INPUT_SIZE, DIGITS_MEAN, DIGITS_STD, DIGITS_WEIGHTS, DigitsNet
from zsq.errors import UsageError
from zsq.paths import user_path
from zsq.teacher import INTERPOLATIONS, ModelSource, ModelSpec, Teacher
from zsq.weight_files import TORCH_SUFFIXES, load_weights

__all__ = ["ModelEntry", "ModelSource", "ModelSpec", "Teacher", "load_model", "models"]


def load_model(
    model: str | Path | Teacher,
    *,
    weights: str | Path | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Teacher:
    """The model to quantize, ready and checked.

    Args:
        model: `digits` (bundled), `path/to/file.py:factory` (the user's code; it is executed), a timm name,
            or a Teacher, which is returned as it is.
        weights: a `.safetensors`, `.pt` or `.pth` file; None takes the bundled or published weights, or those
            that the factory made.
        input_size: (C, H, W); needed with a file, otherwise replaces the known one.
        mean: one number a channel, for pixels in [0, 1]; None takes the known one, with a file 0.
        std: one number a channel, > 0, for pixels in [0, 1]; None takes the known one, with a file 1.

    Raises:
        UsageError: the model, the weights file or the description of the input is wrong.
    """
    given = {"weights": weights, "input_size": input_size, "mean": mean, "std": std}
    if isinstance(model, Teacher):
        if extra := [key for key, value in given.items() if value is not None]:
            raise UsageError(
                f"A Teacher came together with {', '.join(extra)}, but it has its own. Leave them out."
            )
        return model
    name = str(model)
    path = user_path(weights, "weights file").resolve() if weights is not None else None
    if is_file_name(name):
        return _load_from_file(name, path, input_size, mean, std)
    if name == "digits":
        network: nn.Module = DigitsNet()
        source = ModelSource(kind="bundled", name=name, weights=str(path) if path else None)
        preset = ModelSpec(input_size=DIGITS_INPUT_SIZE, mean=DIGITS_MEAN, std=DIGITS_STD, crop_fraction=1.0)
        path = path or DIGITS_WEIGHTS
    else:
        _reject_paths(name)
        network, full_name, config = network_from_timm(name, pretrained=path is None)
        source = ModelSource(kind="timm", name=full_name, weights=str(path) if path else None)
        if config["crop_mode"] != "center":
            note = f"timm evaluates {full_name} with crop mode {config['crop_mode']!r}; zsq takes the centre"
            source = replace(source, notes=(note,))
        known_interpolation = config["interpolation"] in INTERPOLATIONS
        preset = ModelSpec(
            input_size=tuple(config["input_size"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            crop_fraction=config["crop_pct"],
            interpolation=config["interpolation"] if known_interpolation else "bilinear",
        )
    if path is not None:
        source = replace(source, notes=(*source.notes, *load_weights(network, path)))
    return Teacher(
        network,
        input_size=input_size if input_size is not None else preset.input_size,
        mean=mean if mean is not None else preset.mean,
        std=std if std is not None else preset.std,
        crop_fraction=preset.crop_fraction,
        interpolation=preset.interpolation,
        name=source.name,
        source=source,
    )


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One way to name a model."""

    model: str  # what to write
    input_size: str  # channels x height x width, or where it comes from
    description: str


def models() -> tuple[ModelEntry, ...]:
    """What `load_model` takes: the bundled networks, then how to name others."""
    return (
        ModelEntry(
            model="digits",
            input_size="1x8x8",
            description="bundled: a residual network with BatchNorm for handwritten digits, 10 classes, "
            "56,250 parameters",
        ),
        ModelEntry(
            model="path/to/file.py:factory",
            input_size="--input-size C,H,W",
            description="your code: factory() returns the network; add --weights FILE --mean ... --std ...",
        ),
        ModelEntry(
            model="resnet18.a1_in1k, hf-hub:...",
            input_size="as timm says",
            description="any name that timm knows (pip install 'zsq[timm]'); weights from the model hub or "
            "from --weights FILE",
        ),
    )


def _load_from_file(
    name: str,
    weights: Path | None,
    input_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Teacher:
    network = network_from_file(name)
    file, _, factory = name.rpartition(":")
    if input_size is None:
        raise UsageError(
            f"The model {name} came without an input size, which cannot be read off a network. Give "
            "channels, height and width, for example --input-size 3,32,32."
        )
    if weights is None:
        notes: tuple[str, ...] = (f"no weights file was given: the weights that {factory}() made are used",)
    else:
        notes = load_weights(network, weights)
    source = ModelSource(
        kind="file",
        name=f"{Path(file).expanduser().resolve()}:{factory}",
        weights=str(weights) if weights else None,
        notes=notes,
    )
    return Teacher(network, input_size=input_size, mean=mean, std=std, name=factory, source=source)


def _reject_paths(name: str) -> None:
    """A weights file or another path where a model was expected."""
    if Path(name).suffix in (".safetensors", ".onnx", *TORCH_SUFFIXES):
        raise UsageError(
            f"The model {name!r} is a weights file, which does not say what the network computes. Name the "
            f"network ('digits', path/to/file.py:factory or a timm name) and add --weights {name}."
        )
    if "/" in name and ":" not in name:
        raise UsageError(
            f"The model {name!r} is a path, but no run folder and no Python file. Expected 'digits', "
            "path/to/file.py:factory, a timm name, or the folder of an earlier run."
        )
