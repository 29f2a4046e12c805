"""What engines want: form of quantized numbers, containers, operator set. Data, no branches elsewhere."""

from dataclasses import dataclass, field

from zsq.errors import UsageError

CONTAINERS = ("int2", "int4", "int8")


@dataclass(frozen=True, kw_only=True)
class Target:
    """How an engine takes a quantized network.

    Attributes:
        name: what --target takes.
        widths: bits of the containers it loads, ascending.
        activation_width: the narrowest one for activations, which are not stored in the file: ONNX Runtime
            has 2-bit types, but few of its operators take them.
        rounds_biases: its fusions of 8-bit operators turn biases into integers, which moves codes by a step
            here and there; they are kept off unless bytes are asked for (container "int8").
        symmetric: every zero point must be 0 (codes are signed then); else activations are unsigned codes
            with a zero point and weights signed codes with a zero point a channel.
        opset: ONNX operator set of files whose containers have 4 bits or more.
        refused: container width -> why the engine does not take it.
        notes: what a user of the engine should know.
    """

    name: str
    widths: tuple[int, ...]
    activation_width: int = 4
    rounds_biases: bool = False
    symmetric: bool = False
    opset: int = 21
    refused: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


OPSET_OF_TWO_BITS = 25  # the first with INT2 and UINT2
IR_VERSIONS = {21: 10, 25: 13}  # operator set -> the ONNX file format that came with it

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(name="onnxruntime", widths=(2, 4, 8), rounds_biases=True),
        Target(
            name="openvino",
            widths=(4, 8),
            refused={2: "its ONNX reader has no 2-bit types"},
            notes=(
                "OpenVINO computes in bfloat16 on CPUs that have it; INFERENCE_PRECISION_HINT=f32 gives the "
                "numbers that were verified",
            ),
        ),
        Target(
            name="tensorrt",
            widths=(8,),
            symmetric=True,
            refused=dict.fromkeys((2, 4), "it has no convolutions of less than 8 bits"),
            notes=("TensorRT does not run here: the file was verified in ONNX Runtime",),
        ),
    )
}


def get_target(name: str) -> Target:
    """A target by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TARGETS:
        raise UsageError(f"The target {name!r} is unknown. Expected one of {', '.join(TARGETS)}.")
    return TARGETS[name]


def container_widths(target: Target, container: str | None) -> tuple[int, ...]:
    """Widths that codes may be stored in, ascending.

    Args:
        target: the engine.
        container: the narrowest one wanted; "int8" stores everything in whole bytes, which engines compute
            with faster. None is the narrowest that the target loads.

    Raises:
        UsageError: an unknown container, or one that the target does not load.
    """
    if container is None:
        return target.widths
    if container not in CONTAINERS:
        raise UsageError(f"The container {container!r} is unknown. Expected one of {', '.join(CONTAINERS)}.")
    width = int(container.removeprefix("int"))
    if width not in target.widths:
        smallest = min(target.widths)
        raise UsageError(
            f"{target.name} does not load {container.upper()}: {target.refused[width]}. Use --container "
            f"int{smallest}, which holds codes of fewer bits too, or --target onnxruntime."
        )
    return tuple(w for w in target.widths if w >= width)
