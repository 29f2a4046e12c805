"""Exported files in OpenVINO's runtime."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq.errors import JobError, import_extra, one_line
from zsq.export.account import VERIFIED
from zsq.export.verify import OutputDifference, Reference, differences, run_in_chunks

EXTRA = "openvino"
# Its default on many processors is bfloat16, in which a quantized network is another one. With its
# transformations to integers, OpenVINO 2026.4 gave wrong outputs, other ones in every session, for linear
# layers with 4-bit weights and 8-bit activations placed for engines; without them they are right.
FALLBACKS = (
    {"INFERENCE_PRECISION_HINT": "f32"},
    {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"},
)


class OpenVinoModel(nn.Module):
    """A network in OpenVINO's CPU plugin, float32: images (N, C, H, W) -> logits, or a tuple of outputs."""

    def __init__(self, source: bytes | Path, properties: Mapping[str, str] = FALLBACKS[0]) -> None:
        """Load a network.

        Args:
            source: an ONNX file's bytes, or the .xml of an IR.
            properties: of the compiled network.

        Raises:
            UsageError: openvino is not installed.
            JobError: it does not load the network.
        """
        super().__init__()
        openvino: Any = import_extra("openvino", EXTRA)
        core = openvino.Core()
        try:
            network = core.read_model(source if isinstance(source, bytes) else str(source))
            threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self._compiled = core.compile_model(network, "CPU", {**properties, **threads})
        except RuntimeError as error:
            reason = one_line(error, limit=300)
            raise JobError(f"OpenVINO {openvino.__version__} does not load the network: {reason}.") from error
        self.outputs = [output.get_any_name() for output in self._compiled.outputs]

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Of its input; None stands for free sizes."""
        shape = self._compiled.inputs[0].partial_shape
        return tuple(size.get_length() if size.is_static else None for size in shape)

    def forward(self, images: Tensor) -> Any:
        """The outputs, float32, on the CPU; one tensor if there is one."""
        results = self._compiled(images.detach().cpu().float().contiguous().numpy())
        found = [torch.from_numpy(results[output].copy()) for output in self._compiled.outputs]
        return found[0] if len(found) == 1 else tuple(found)


@dataclass(frozen=True)
class OpenVinoCheck:
    """How a file compared in OpenVINO with the student, in float32, outputs in order.

    `properties` are those that the network needs to be compiled with.
    """

    engine: str
    properties: Mapping[str, str]
    num_images: int
    outputs: tuple[OutputDifference, ...]

    def to_json(self) -> dict[str, Any]:
        """As a dictionary."""
        return {
            "engine": self.engine,
            "properties": dict(self.properties),
            VERIFIED: {
                "num_images": self.num_images,
                "outputs": [asdict(difference) for difference in self.outputs],
            },
        }


def check_in_openvino(source: bytes | Path, reference: Reference) -> OpenVinoCheck:
    """Compare a file with the student it was made from.

    Args:
        source: as for `OpenVinoModel`.
        reference: the student's outputs.

    Raises:
        JobError: OpenVINO does not load it, or computes something else with all properties that were tried.
    """
    version = import_extra("openvino", EXTRA).__version__
    wrong: list[OutputDifference] = []
    for properties in FALLBACKS:
        engine = OpenVinoModel(source, properties)
        found = tuple(differences(engine.outputs, run_in_chunks(engine, reference.images), reference))
        if all(difference.agrees for difference in found):
            return OpenVinoCheck(f"openvino {version}", properties, len(reference.images), found)
        wrong = wrong or [difference for difference in found if not difference.agrees]
    worst = max(wrong, key=lambda difference: difference.relative_error)
    raise JobError(
        f"OpenVINO {version} computes something else with the exported file than the student (output "
        f"{worst.name}: relative error {worst.relative_error:.2g}), so it was not written. ONNX Runtime "
        "agrees with it: try --container int8, or --target onnxruntime."
    )
