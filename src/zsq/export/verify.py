"""The exported file in the engine against the student in PyTorch, on the run's images."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from zsq.errors import JobError, import_extra
from zsq.export.account import VERIFIED
from zsq.export.bisect import CHUNK, MAX_ERROR, first_difference, relative_error
from zsq.export.builder import EXTRA
from zsq.export.engine import LEVELS, EngineModel, SessionOptions
from zsq.graph.nodes import LAYERS, MOVES
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer

NUM_IMAGES = 128
MAX_DISAGREEMENT = 0.01  # share of positions whose class differs, beyond which a file is refused
NEAR_TIES = 2  # positions that may differ in any case, however few there are
ROUNDING = 5.0  # both may be this many times what float32 itself changes (float32 against float64)
FALLBACKS = (  # session options that are tried in turn when the defaults do not work
    SessionOptions(),
    SessionOptions(disabled=("WeightBiasQuantization",)),
    SessionOptions(disabled=("WeightBiasQuantization", "ClipQuantRewrite", "ReluQuantRewrite")),
    SessionOptions(optimization="ORT_DISABLE_ALL"),
)


@dataclass(frozen=True)
class OutputDifference:
    """How an output of the file differs from the student's.

    Attributes:
        name: of the output.
        positions: how many classes it names: images, times positions for a map.
        argmax_agreement: share of positions, in percent, at which both name the same class (axis 1); None
            without classes.
        max_steps, mean_steps: absolute difference, counted in the largest change of that output which one
            quantization step of one input of its layer makes; None if no quantized layer computes it.
        relative_error: root mean square of the difference over that of the student's output.
        rounding: the same of the student in float32 against float64: what rounding alone does.
        rounding_agreement: and its agreement of classes, in percent.
    """

    name: str
    positions: int
    argmax_agreement: float | None
    max_steps: float | None
    mean_steps: float | None
    relative_error: float
    rounding: float
    rounding_agreement: float | None

    @property
    def agrees(self) -> bool:
        """Whether the difference is within `MAX_ERROR` and `MAX_DISAGREEMENT`, or what rounding explains."""
        if not self.relative_error <= max(MAX_ERROR, ROUNDING * self.rounding):
            return False
        if self.argmax_agreement is None or self.rounding_agreement is None:
            return True
        allowed = max(
            MAX_DISAGREEMENT, ROUNDING * (1 - self.rounding_agreement / 100), NEAR_TIES / self.positions
        )
        return 1 - self.argmax_agreement / 100 <= allowed


@dataclass(frozen=True)
class Verification:
    """That a file computes what the student computes.

    Attributes:
        engine: and its version.
        session: the options that it needs; the engine's defaults if nothing is special.
        num_images: on which both were compared.
        optimized, plain: differences of the outputs with the engine's graph optimizations and without.
        agreement_with_run: percent, class by class, with the run's own student, where the target made it
            differ from the exported network.
    """

    engine: str
    session: SessionOptions
    num_images: int
    optimized: tuple[OutputDifference, ...]
    plain: tuple[OutputDifference, ...]
    agreement_with_run: float | None

    def to_json(self) -> dict[str, Any]:
        """As a dictionary."""
        return {
            "engine": self.engine,
            "session": self.session.to_json(),
            VERIFIED: {
                "num_images": self.num_images,
                "agreement_with_run": self.agreement_with_run,
                "optimized": [asdict(d) for d in self.optimized],
                "plain": [asdict(d) for d in self.plain],
            },
        }


def verify(content: bytes, reference: "Reference", original: nn.Module) -> Verification:
    """Compare a file with the network it was made from, with the engine's optimizations on and off.

    Args:
        content: the ONNX file.
        reference: outputs of the prepared student that it was lowered from.
        original: the run's student.

    Raises:
        JobError: the engine does not load the file or computes something else with every session option that
            was tried; the text names the node at which they part.
    """
    runtime: Any = import_extra("onnxruntime", EXTRA)
    plain = _differences(content, SessionOptions(optimization=LEVELS[1]), reference)
    wrong = [d for d in plain if not d.agrees]
    if wrong:
        raise JobError(_refusal(content, SessionOptions(optimization=LEVELS[1]), reference, wrong))
    failure: tuple[SessionOptions, list[OutputDifference]] | JobError | None = None
    for options in FALLBACKS:
        try:
            optimized = _differences(content, options, reference)
        except JobError as error:
            failure = failure or error
            continue
        wrong = [d for d in optimized if not d.agrees]
        if not wrong:
            break
        failure = failure or (options, wrong)
    else:
        assert failure is not None
        if isinstance(failure, JobError):
            raise failure
        raise JobError(_refusal(content, failure[0], reference, failure[1]))
    return Verification(
        engine=f"onnxruntime {runtime.__version__}",
        session=options,
        num_images=len(reference.images),
        optimized=tuple(optimized),
        plain=tuple(plain),
        agreement_with_run=_argmax_agreement(
            run_in_chunks(original, reference.images)[0], reference.outputs[0]
        ),
    )


class Reference:
    """A prepared student's outputs on images, what rounding does to them, and the steps to count in."""

    def __init__(self, student: fx.GraphModule, images: Tensor) -> None:
        self.student, self.images = student, images
        self.outputs = run_in_chunks(student, images)
        precise = copy.deepcopy(student).double()
        self.precise = [y.float() for y in run_in_chunks(precise, images.double())]
        returned = next(n for n in student.graph.nodes if n.op == "output").all_input_nodes
        self.steps = [_output_step(student, node) for node in returned]


@torch.no_grad()
def run_in_chunks(model: nn.Module, images: Tensor) -> list[Tensor]:
    """All outputs of a model for many images."""
    chunks = [pytree.tree_leaves(model(images[i : i + CHUNK])) for i in range(0, len(images), CHUNK)]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _differences(content: bytes, options: SessionOptions, reference: Reference) -> list[OutputDifference]:
    engine = EngineModel(content, options)
    return differences(engine.outputs, run_in_chunks(engine, reference.images), reference)


def differences(
    names: Sequence[str], outputs: Sequence[Tensor], reference: Reference
) -> list[OutputDifference]:
    """How outputs on the reference's images differ from the reference's."""
    return [
        _difference(name, got, wanted, precise, step)
        for name, got, wanted, precise, step in zip(
            names, outputs, reference.outputs, reference.precise, reference.steps, strict=True
        )
    ]


def _difference(
    name: str, got: Tensor, wanted: Tensor, precise: Tensor, step: float | None
) -> OutputDifference:
    gap = (got - wanted).abs()
    return OutputDifference(
        name=name,
        positions=wanted[:, 0].numel() if wanted.ndim > 1 else len(wanted),
        argmax_agreement=_argmax_agreement(got, wanted),
        max_steps=None if step is None else float(gap.max()) / step,
        mean_steps=None if step is None else float(gap.mean()) / step,
        relative_error=relative_error(got, wanted),
        rounding=relative_error(precise, wanted),
        rounding_agreement=_argmax_agreement(precise, wanted),
    )


def _argmax_agreement(got: Tensor, wanted: Tensor) -> float | None:
    if got.ndim < 2 or got.shape[1] < 2:
        return None
    return 100 * float((got.argmax(1) == wanted.argmax(1)).double().mean())


def _output_step(student: fx.GraphModule, node: fx.Node) -> float | None:
    """The most that one step of one quantized input of the nearest layer changes a tensor."""
    while node.op == "call_function" and node.target not in LAYERS and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.op != "call_function" or node.target not in LAYERS:
        return None
    tensor: Any = node.args[0]
    while isinstance(tensor, fx.Node) and tensor.target in MOVES:
        tensor = tensor.args[0]
    source, weight = _called(student, tensor), _called(student, node.args[1])
    if not isinstance(source, ActivationQuantizer) or not isinstance(weight, WeightQuantizer):
        return None
    return float(source.scale * weight().abs().max()) or None


def _called(student: fx.GraphModule, argument: Any) -> nn.Module | None:
    if isinstance(argument, fx.Node) and argument.op == "call_module":
        return student.get_submodule(str(argument.target))
    return None


def _refusal(
    content: bytes, options: SessionOptions, reference: Reference, wrong: Sequence[OutputDifference]
) -> str:
    worst = max(wrong, key=lambda d: d.relative_error)
    how = "with" if options.optimization == LEVELS[0] else "without"
    agreement = "" if worst.argmax_agreement is None else f", {worst.argmax_agreement:.1f} % of classes agree"
    node = first_difference(content, options, reference.student, reference.images)
    where = f"They part at the node {node}. " if node else "No single node could be named. "
    return (
        f"The exported file does not compute what the student computes ({how} the engine's optimizations, "
        f"output {worst.name}: relative error {worst.relative_error:.2g}{agreement}), so it was not written. "
        f"{where}Try another --target or --container int8, and report the model: this is a fault of the "
        "engine or of zsq."
    )
