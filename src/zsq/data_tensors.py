"""Images that zsq made: images.safetensors of a run folder or of `zsq synthesize`."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zsq.errors import UsageError, one_line
from zsq.pictures import Source
from zsq.teacher import ModelSpec

FILE = "images.safetensors"


def holds_made_images(path: Path) -> bool:
    """Whether a folder holds images as zsq writes them."""
    return (path / FILE).is_file()


def open_made_images(path: Path, spec: ModelSpec, labelled: bool) -> Source:
    """Normalised anew if they were made for a model with another mean and deviation.

    Raises:
        UsageError: damaged, of another size, or labels were asked for.
    """
    file = path / FILE
    if labelled:
        raise UsageError(
            f"The folder {path} holds images that zsq made, which say nothing about accuracy. Expected real "
            "labelled images."
        )
    try:
        with safe_open(file, "pt") as content:
            images = content.get_tensor("images")
            labels = content.get_tensor("labels") if "labels" in content.keys() else None
            made_for = json.loads((content.metadata() or {}).get("spec", "{}"))
        mean, std = (
            torch.tensor(made_for.get(name, getattr(spec, name)), dtype=torch.float32).view(-1, 1, 1)
            for name in ("mean", "std")
        )
        found = tuple(images.shape[1:])
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != images.shape[:1]):
            raise ValueError(f"its labels are {labels.dtype} of shape {tuple(labels.shape)}")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != len(spec.mean) or not values.isfinite().all():
                raise ValueError(f"its {name} is {made_for[name]}")
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"The file {file} cannot be read ({one_line(error)}). Make the images again with zsq synthesize."
        ) from error
    if images.ndim != 4 or found != spec.input_size or not images.is_floating_point():
        raise UsageError(
            f"The file {file} holds images of shape {found}, and the model takes {spec.input_size}. Make "
            "them for this model with zsq synthesize."
        )
    own_mean, own_std = (
        torch.tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (spec.mean, spec.std)
    )
    same = torch.equal(mean, own_mean) and torch.equal(std, own_std)

    def read(positions: Sequence[int]) -> Tensor:
        chosen: Tensor = images[list(positions)].float()
        return chosen if same else (chosen * std + mean - own_mean) / own_std

    return Source(name=f"The folder {path}", count=len(images), read=read, labels=labels)
