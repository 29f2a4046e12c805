"""Tensors between units, for all images: computed a few images at a time, kept while a unit reads them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from zsq.graph.blocks import Unit, last_readers
from zsq.graph.tensors import device_of
from zsq.out_of_memory import in_chunks
from zsq.quant.choice import Rows, random_choice
from zsq.quant.fused import kernels_for
from zsq.recover.storage import MEMORY, Storage

CHUNK = 64  # images a forward pass when caching


class Between:
    """What one network gives its units, from the images on; a tensor is let go after its last reader.

    Units come in their order: `inputs` of one, then `put` what it returns.
    """

    def __init__(self, graph: fx.Graph, units: Sequence[Unit], images: Tensor) -> None:
        self._last = last_readers(units)
        self._units = list(units)
        self._cache = {next(n.name for n in graph.nodes if n.op == "placeholder"): images}

    def inputs(self, index: int) -> list[Tensor]:
        """What the unit of this number reads, each for all images."""
        return [self._cache[name] for name in self._units[index].inputs]

    def put(self, index: int, outputs: Sequence[Tensor]) -> None:
        """Keep what the unit of this number returns, and let go what no later one reads."""
        self._cache.update(zip(self._units[index].outputs, outputs, strict=True))
        for name in [n for n in self._cache if self._last.get(n, -1) <= index]:
            del self._cache[name]


@torch.no_grad()
def forward_in_chunks(part: nn.Module, inputs: Sequence[Tensor], storage: Storage = MEMORY) -> list[Tensor]:
    """Outputs of a unit for all images, computed a few images at a time and put where `storage` says."""
    device, count = device_of(part), len(inputs[0])
    outputs: list[Tensor] = []

    def forward(rows: slice) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = part(*(x[rows].to(device) for x in inputs))
        return found

    for rows, pieces in in_chunks(forward, count, CHUNK, "caching what units return"):
        num_images = rows.stop - rows.start
        if not outputs:
            outputs = [storage.room(piece, len(piece) // num_images * count) for piece in pieces]
        for output, piece in zip(outputs, pieces, strict=True):
            each = len(piece) // num_images  # rows an image
            output[rows.start * each : rows.stop * each] = piece
        storage.release()
    return outputs


def take(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` along axis 0 on the device of `index`, in the memory format of `x`.

    Many times faster for channels-last tensors.
    """
    where = index.to(x.device)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, where).to(index.device).permute(0, 3, 1, 2)
    return x.index_select(0, where).to(index.device)


def take_mixed(
    x: Tensor, other: Tensor, index: Tensor, prob: float, rng: torch.Generator, rows: Rows | None = None
) -> Tensor:
    """`take(x, index)` with elements of `take(other, index)` with probability `prob`; no gradients.

    Args:
        x, other: finite, of one shape.
        index: (n,).
        prob: of an element of `other`.
        rng: see `random_choice`.
        rows: see `random_choice`.
    """
    x, other = x.detach(), other.detach()
    fused = kernels_for((x, other)) if index.device == x.device and len(index) <= len(x) else None
    if fused is not None:
        return fused.mixed_rows(x, other, index, random_choice(x[: len(index)], prob, rng, rows))
    taken = take(x, index)
    return torch.lerp(taken, take(other, index), random_choice(taken, prob, rng, rows).mask())


def chunk_pairs(
    targets: Sequence[Tensor], outputs: Sequence[Tensor], storage: Storage
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of pieces: checks need tensors several times as large as what they look at."""
    for target, output in zip(targets, outputs, strict=True):
        for pair in zip(target.split(CHUNK), output.split(CHUNK), strict=True):
            yield pair
            storage.release()
