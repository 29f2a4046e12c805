"""The teacher: a checked, frozen copy of the full-precision model, and how its input looks."""

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from zsq.architectures import error_summary
from zsq.errors import UsageError
from zsq.weight_files import first_few, is_counter

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a network expects of an image.

    A photograph is resized so that its shorter side is round(H / crop_fraction) pixels, the centre (H, W) is
    cut out, pixels are brought to [0, 1], and each channel becomes (pixel - mean) / std.

    Raises:
        UsageError: a size that is not positive, not one mean and std a channel, a std <= 0, a crop fraction
            outside (0, 1], an unknown interpolation.
    """

    input_size: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]  # (C,), for pixels in [0, 1]
    std: tuple[float, ...]  # (C,), > 0, for pixels in [0, 1]
    crop_fraction: float  # 0 < crop_fraction <= 1
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or any(size < 1 for size in self.input_size):
            raise UsageError(
                f"The input size is {_listed(self.input_size)}. Expected channels, height and width as three "
                "positive whole numbers, for example 3,32,32."
            )
        channels = self.input_size[0]
        for what, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels or not all(map(math.isfinite, values)):
                raise UsageError(
                    f"The {what} is {_listed(values)}. Expected {channels} finite numbers, one a channel of "
                    f"the input size {_listed(self.input_size)}, for pixels in [0, 1]."
                )
        if min(self.std) <= 0:
            raise UsageError(
                f"The std is {_listed(self.std)}. Every value must be above 0, as pixels are divided by it."
            )
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(
                f"The crop fraction is {self.crop_fraction}. Expected a number above 0, at most 1."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"The interpolation is {self.interpolation!r}. Expected one of {', '.join(INTERPOLATIONS)}."
            )


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """How to load the model again, with `load_model(name, weights=weights, ...)`; plain values for JSON."""

    kind: Literal["bundled", "timm", "file", "memory"]  # memory: made by the caller, cannot be loaded again
    name: str  # "digits", a timm name, /path/to/file.py:factory
    weights: str | None = None  # path of the weights file; None: the model's own
    notes: tuple[str, ...] = ()  # what was assumed or converted; sentences for the user


class Teacher:
    """The full-precision model: a frozen float32 copy in eval mode, with what is known of its input.

    Attributes:
        module: the network: images (N, C, H, W), normalised -> one tensor (N, ...), logits (N, K) if it
            classifies.
        spec: size and normalisation of its input.
        output_shape: shape of the output without N; (K,) for a classifier.
        name: short name for people.
        source: how to load it again.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        input_size: Sequence[int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_fraction: float | None = None,
        interpolation: str = "bilinear",
        name: str = "model",
        source: ModelSource | None = None,
    ) -> None:
        """Copy and check `module`; the caller's own stays as it is.

        Args:
            module: a network with one input, on any device.
            input_size: (C, H, W).
            mean: one number a channel, for pixels in [0, 1]; None means 0.
            std: one number a channel, > 0, for pixels in [0, 1]; None means 1.
            crop_fraction: see `ModelSpec`; None means 0.875 if H >= 128, else 1.
            interpolation: how photographs are resized.
            name: short name for people.
            source: how to load it again; None means that it cannot.

        Raises:
            UsageError: weights that are NaN or infinite, or a network that rejects such an input.
        """
        size = tuple(int(value) for value in input_size)
        channels = size[0] if size else 0
        notes: list[str] = []
        if mean is None or std is None:
            notes.append(_assumption(mean, std))
        self.spec = ModelSpec(
            input_size=size,  # type: ignore[arg-type]  # ModelSpec checks the length
            mean=tuple(float(value) for value in mean) if mean is not None else (0.0,) * channels,
            std=tuple(float(value) for value in std) if std is not None else (1.0,) * channels,
            crop_fraction=crop_fraction if crop_fraction is not None else default_crop_fraction(size),
            interpolation=interpolation,
        )
        self.name = name
        self.module = _frozen(module, notes)
        _check_finite(self.module, name)
        self.output_shape = _check_forward(self.module, self.spec.input_size, name)
        source = source or ModelSource(kind="memory", name=name)
        self.source = replace(source, notes=(*source.notes, *notes))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed or converted when the model was loaded; sentences for the user."""
        return self.source.notes

    @property
    def sha256(self) -> str:
        """Hash of the names, shapes, number formats and bytes of all weights and buffers, in order of name.

        Counters of batches are left out: they do not change what the network computes.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            if isinstance(value, Tensor) and not is_counter(name):
                digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
                digest.update(
                    value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                )
        return digest.hexdigest()


def default_crop_fraction(input_size: Sequence[int]) -> float:
    """0.875 for photographs (H >= 128), as ImageNet networks are evaluated; 1 for small images."""
    return 0.875 if len(input_size) > 1 and input_size[1] >= 128 else 1.0


def _assumption(mean: Sequence[float] | None, std: Sequence[float] | None) -> str:
    if mean is None and std is None:
        return "no mean and std were given: assuming pixels in [0, 1] (mean 0, std 1)"
    return "no mean was given: assuming 0" if mean is None else "no std was given: assuming 1"


def _frozen(module: nn.Module, notes: list[str]) -> nn.Module:
    """A float32 copy in eval mode that takes no gradients."""
    try:
        network = copy.deepcopy(module)
    except Exception as error:
        raise UsageError(
            f"The model cannot be copied ({error_summary(error)}). Make sure that copy.deepcopy(model) works."
        ) from error
    values = (*network.parameters(), *network.buffers())
    if any(is_lazy(value) for value in values):
        raise UsageError(
            "The model has lazy layers, whose weights have no shape before the first image. Run it once on "
            "an image where it is made, before its weights are loaded."
        )
    formats = sorted(
        {str(v.dtype).removeprefix("torch.") for v in values if v.is_floating_point()} - {"float32"}
    )
    if formats:
        notes.append(f"the model came in {' and '.join(formats)}; its weights were converted to float32")
    return network.float().eval().requires_grad_(False)


def _check_finite(module: nn.Module, name: str) -> None:
    broken = [
        key
        for key, value in module.state_dict().items()
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        raise UsageError(
            f"The weights of {name} contain NaN or infinity in {len(broken)} tensors: {first_few(broken)}. "
            "Expected finite numbers; take a checkpoint from before training diverged, and do not store "
            "weights above 65504 in float16."
        )


def _check_forward(module: nn.Module, input_size: tuple[int, int, int], name: str) -> tuple[int, ...]:
    """Run two black images through the network; the shape of its output without N."""
    first = next(iter((*module.parameters(), *module.buffers())), None)
    shape = (2, *input_size)
    expected = "Expected a network with one input, images (N, C, H, W)"
    try:
        with torch.no_grad():
            output = module(torch.zeros(shape, device=first.device if first is not None else "cpu"))
    except Exception as error:
        raise UsageError(
            f"The model {name} rejects input of shape {shape} ({error_summary(error)}). "
            f"{expected}; check the input size {_listed(input_size)} (channels, height, width)."
        ) from error
    if not isinstance(output, Tensor) or output.ndim == 0 or output.shape[0] != 2:
        is_tensor = isinstance(output, Tensor)
        what = f"shape {tuple(output.shape)}" if is_tensor else f"type {type(output).__name__}"
        raise UsageError(
            f"The model {name} answers input of shape {shape} with an output of {what}. "
            f"{expected}, and one tensor (N, ...) as output; check the input size, or wrap the network in a "
            "module that returns it."
        )
    if output.isnan().any():
        raise UsageError(
            f"The model {name} answers a black image with NaN although its weights are finite. Expected "
            "finite logits; check that the weights belong to this network (a negative BatchNorm variance "
            "does this)."
        )
    return tuple(output.shape[1:])


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
