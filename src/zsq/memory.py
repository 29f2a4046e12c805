"""How much memory a run takes, from the shapes in the graph alone."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.blocks import Unit, last_readers
from zsq.graph.nodes import activations, weight_node
from zsq.images.sources import WIDTHS

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def read_bytes(value: int | str) -> int:
    """4294967296, "4GiB", "500 MB" -> bytes.

    Raises:
        UsageError: something else, or nothing.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kmg]?i?b?)\s*", str(value).lower())
    if match is None or match[2] not in UNITS or float(match[1]) * UNITS[match[2]] < 1:
        raise UsageError(f"--memory takes a size such as 4GiB or 500MB; got {value!r}.")
    return int(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class Memory:
    """What a run holds at its peaks, in bytes; computed from shapes, without the program and its libraries.

    Attributes:
        weights: teacher and student.
        images: all of them.
        synthesis: a batch's tensors in the teacher and the generator, in float32, and the generator's
            parameters with gradients and Adam's two moments.
        caches: what is kept of the tensors between units, where it is most.
        step: one step of reconstruction, one pass over a chunk or the calibration, whichever takes most.
    """

    weights: int
    images: int
    synthesis: int
    caches: int
    step: int

    def reconstruction(self, bound: int | None = None) -> int:
        """While units are learned; with caches above `bound` bytes they are in files."""
        in_memory = self.caches if bound is None or self.caches <= bound else 0
        return self.weights + self.images + in_memory + self.step


def cache_bytes(graph: fx.Graph, units: Sequence[Unit], num_images: int) -> int:
    """What reconstruction keeps of the tensors between units, where it is most.

    The teacher's and the student's inputs of the unit in work, its targets and outputs, and what later units
    read; not the images.
    """
    sizes = {node.name: _bytes_an_image(node) for node in activations(graph)}
    last = last_readers(units)
    live: set[str] = set()
    most = 0
    for index, unit in enumerate(units):
        live |= set(unit.outputs)
        most = max(most, sum(2 * sizes.get(name, 0) for name in live))
        live = {name for name in live if last.get(name, -1) > index}
    return most * num_images


def estimate(
    graph_module: fx.GraphModule,
    units: Sequence[Unit],
    *,
    num_images: int,
    synthesis_batch: int,
    latent_size: int,
    batch_size: int,
    chunk: int,
) -> Memory:
    """The memory of a run.

    Args:
        graph_module: captured network.
        units: of it.
        num_images: made and calibrated on.
        synthesis_batch: images optimised together.
        latent_size: of the generator.
        batch_size: images a step of reconstruction.
        chunk: images a pass without gradients, over units.
    """
    nodes = {node.name: node for node in activations(graph_module.graph)}
    sizes = {name: _bytes_an_image(node) for name, node in nodes.items()}
    weights = sum(t.numel() * t.element_size() for t in graph_module.state_dict().values())
    placeholder = next(node for node in graph_module.graph.nodes if node.op == "placeholder")
    step = 0
    for unit in units:
        made = sum(sizes[name] for name in unit.nodes)
        # Each quantizer keeps two more tensors of its input's size, and its mask and output are as large.
        read = [
            n
            for name in unit.layers
            for n in nodes[name].all_input_nodes
            if n is not weight_node(nodes[name])
        ]
        quantized = 4 * sum(sizes.get(node.name, 0) or _bytes_an_image(node) for node in set(read))
        inputs = 4 * sum(sizes.get(name, 0) or _bytes_an_image(placeholder) for name in unit.inputs)
        largest = 2 * max(sizes[name] for name in unit.nodes)  # gradients on their way
        step = max(step, batch_size * (made + quantized + inputs + largest), chunk * (2 * largest + inputs))
    return Memory(
        weights=2 * weights,
        images=num_images * _bytes_an_image(placeholder),
        synthesis=synthesis_batch * (sum(sizes.values()) + 2 * max(sizes.values()))
        + _generator_bytes(placeholder, latent_size, synthesis_batch),
        caches=cache_bytes(graph_module.graph, units, num_images),
        step=step,
    )


def _generator_bytes(placeholder: fx.Node, latent_size: int, num_images: int) -> int:
    """Parameters four times (gradients, Adam) and the tensors of a pass, see `LatentGenerator`."""
    channels, height, width = map(int, placeholder.meta["val"].shape[1:])
    pixels = math.ceil(height / 4) * math.ceil(width / 4)
    wide, narrow = (count * pixels for count in WIDTHS)
    first = 3 * wide  # the linear layer, its channels-last copy, normalised
    second, third = 5 * 4 * narrow, 4 * 16 * channels * pixels  # 2 x 2 and 4 x 4 times as many pixels
    return 4 * (4 * wide * (latent_size + 1) + num_images * (first + second + third))


def _bytes_an_image(node: fx.Node) -> int:
    """Size of what a node returns for one image."""
    values = node.meta.get("val")
    found = values if isinstance(values, (tuple, list)) else [values]
    total = 0
    for value in found:
        if isinstance(value, Tensor) and value.ndim:
            rows = value.shape[0]
            traced = 1.0 if isinstance(rows, int) else rows.node.hint / EXAMPLE
            total += int(traced * value[0].numel()) * value.element_size()
    return total


EXAMPLE = 2  # images in the batch that `capture` traces with
