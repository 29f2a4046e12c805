"""Batches of synthetic images: how many, under which names, kept with what they were made from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsq.images.pixel_settings import MadeInBatches
from zsq.images.sources import LatentGenerator

SMALLEST_BATCH = 8  # statistics of fewer images are too noisy to match
GENERATOR = "generator."  # before the names of a kept generator's parameters
Log = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Batch:
    """One batch of synthetic images and what they were made from.

    Attributes:
        images: (N, C, H, W), normalised, float32, on the teacher's device: the prior applied to
            `generator(latents)`.
        latents: (N, latent_size).
        generator: trained for these latents.
        labels: (N,) int64, the classes that the images were made for; None if they have none.
        second: (N,) int64, their second classes; None if they have one each.
    """

    images: Tensor
    latents: Tensor
    generator: LatentGenerator
    labels: Tensor | None = None
    second: Tensor | None = None


def is_complete(piece: Mapping[str, Tensor] | None, keep_sources: bool) -> bool:
    """Whether a finished batch is there, and with its latents and generator if they are wanted."""
    return piece is not None and (not keep_sources or "latents" in piece)


def piece_of(batch: Batch, *, keep_source: bool) -> dict[str, Tensor]:
    """A batch as tensors by name, on the CPU; without its latents and generator unless they are wanted."""
    source = {f"{GENERATOR}{name}": tensor.cpu() for name, tensor in batch.generator.state_dict().items()}
    kept = {"latents": batch.latents.cpu(), **source} if keep_source else {}
    classes = {"labels": batch.labels, "second": batch.second}
    known = {name: labels.cpu() for name, labels in classes.items() if labels is not None}
    return {"images": batch.images.cpu(), **known, **kept}


def batch_from_piece(piece: Mapping[str, Tensor], device: torch.device) -> Batch:
    """The batch that `piece_of` was given, with its source; on a device."""
    latents = piece["latents"].to(device)
    size: Any = tuple(piece["images"].shape[1:])
    generator = LatentGenerator(size, latent_size=latents.shape[1], rng=torch.Generator())
    generator.load_state_dict(generator_state(piece))
    return Batch(
        piece["images"].to(device),
        latents,
        generator.to(device).requires_grad_(False),
        piece.get("labels"),
        piece.get("second"),
    )


def generator_state(piece: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the generator that a finished batch kept."""
    return {k.removeprefix(GENERATOR): v for k, v in piece.items() if k.startswith(GENERATOR)}


def batch_names(settings: MadeInBatches) -> list[str]:
    """Under which the batches are kept once they are finished, in order."""
    count = len(batch_sizes(settings.num_images, settings.batch_size))
    return [f"synthesis-{index:03d}" for index in range(count)]


def log_batch(log: Log, name: str, steps: int, step: int, values: dict[str, float]) -> None:
    """`log` with its arguments in the order in which they become known."""
    log(name, step, steps, values)


def room_advice(settings: MadeInBatches) -> str:
    """What to do if a batch does not fit: it is not halved, as its joint statistics are what is optimised."""
    smaller = f"Lower synthesis.batch_size (now {settings.batch_size})"
    if settings.precision != "bfloat16":
        smaller += f" or take synthesis.precision=bfloat16 (now {settings.precision})"
    return f"{smaller}; the images are then others."


def batch_sizes(num_images: int, batch_size: int) -> tuple[int, ...]:
    """Full batches and one of what remains; sizes as equal as possible if that one would be too small."""
    full, rest = divmod(num_images, batch_size)
    if not full or rest == 0 or rest >= min(SMALLEST_BATCH, batch_size):
        return (batch_size,) * full + ((rest,) if rest else ())
    count = full + 1 if num_images >= 2 * (full + 1) else full
    return tuple(num_images // count + (index < num_images % count) for index in range(count))
