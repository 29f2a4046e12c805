"""How much faster a quantized network is than the same network in float32, in the same engine."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq.errors import UsageError
from zsq.export.engine import EngineModel, SessionOptions
from zsq.export.integer import Fused, fused_operators
from zsq.export.lower import lower, serialized
from zsq.export.onnx import checked, require_packages
from zsq.export.prepare import prepared
from zsq.export.targets import container_widths, get_target
from zsq.files import write_atomic
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from zsq.run import LATENCIES, Run, load_run

WARM_UP = 3  # calls that are not counted


@dataclass(frozen=True)
class Latency:
    """Time of a call, in milliseconds; medians over calls that took turns.

    Attributes:
        engine: and its version.
        batch_size: images a call.
        threads: of the engine.
        rounds: calls of each.
        float_ms, quantized_ms: of the network in float32 and quantized.
        ratio: how many times as fast the quantized one is: median over rounds of the quotient of their times.
        ratio_quartiles: first and third quartile of that quotient.
        container: narrowest integers in the quantized file.
        fused: what the engine computes in integers.
    """

    engine: str
    batch_size: int
    threads: int
    rounds: int
    float_ms: float
    quantized_ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    container: str
    fused: Fused

    def to_json(self) -> dict[str, Any]:
        """As a dictionary."""
        return asdict(self)


def bench_latency(
    run: Run | str | Path,
    *,
    batch_size: int = 1,
    threads: int = 1,
    rounds: int = 50,
    container: str | None = "int8",
) -> Latency:
    """Time a run in ONNX Runtime beside the same network in float32, call by call in turns.

    The float network is the student without its activation quantizers, its weights those that the codes stand
    for: layer by layer what the teacher computes, with BatchNorm folded as in the quantized file.

    Args:
        run: a Run, or the folder of one.
        batch_size: images a call.
        threads: of the engine, in both.
        rounds: calls of each.
        container: as for `export_onnx`; "int8" is what this engine computes in integers.

    Raises:
        UsageError: numbers below 1, or as for `export_onnx`.
        JobError: the quantized file does not compute what the student computes.
    """
    if min(batch_size, threads, rounds) < 1:
        raise UsageError(
            f"Batch size, threads and rounds must be at least 1, got {batch_size}, {threads} and {rounds}."
        )
    target = get_target("onnxruntime")
    widths = container_widths(target, container)
    require_packages()
    loaded = run if isinstance(run, Run) else load_run(run)
    found = checked(loaded, target, widths, {})
    student, _ = prepared(loaded.student, loaded.images, target)
    plain = serialized(lower(in_float(student), target, widths, {}))
    images = loaded.images.repeat(-(-batch_size // len(loaded.images)), 1, 1, 1)[:batch_size]
    models = [
        EngineModel(plain, SessionOptions(), threads=threads),
        EngineModel(found.content, found.verification.session, threads=threads),
    ]
    before, after = take_turns([_call(model, images) for model in models], rounds)
    quotients = [a / b for a, b in zip(before, after, strict=True)]
    low, ratio, high = (
        statistics.quantiles(quotients, n=4, method="inclusive") if rounds > 1 else quotients * 3
    )
    return Latency(
        engine=found.verification.engine,
        batch_size=batch_size,
        threads=threads,
        rounds=rounds,
        float_ms=1000 * statistics.median(before),
        quantized_ms=1000 * statistics.median(after),
        ratio=ratio,
        ratio_quartiles=(low, high),
        container=container or f"int{min(widths)}",
        fused=fused_operators(found.content, found.verification.session),
    )


def keep_latency(found: Latency, folder: Path) -> Path:
    """Add a measurement, with its date, to those in a run folder, where the report looks for them.

    Raises:
        JobError: the file cannot be written.
    """
    path = folder / LATENCIES
    date = datetime.now(UTC).isoformat(timespec="minutes").replace("+00:00", "Z")
    line = json.dumps({"date": date, **found.to_json()}, allow_nan=False) + "\n"
    write_atomic(path, (path.read_bytes() if path.is_file() else b"") + line.encode())
    return path


def take_turns(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of every call, by callable: all of them once a round, first and last in turns."""
    for call in calls * WARM_UP:
        call()
    found: list[list[float]] = [[] for _ in calls]
    for index in range(rounds):
        order = range(len(calls)) if index % 2 == 0 else reversed(range(len(calls)))
        for which in order:
            started = time.perf_counter()
            calls[which]()
            found[which].append(time.perf_counter() - started)
    return found


def in_float(student: fx.GraphModule) -> fx.GraphModule:
    """A prepared student without quantizers, in place: float weights, and activations as they are."""
    for node in list(student.graph.nodes):
        if node.op != "call_module":
            continue
        name = str(node.target)
        quantizer = student.get_submodule(name)
        if isinstance(quantizer, WeightQuantizer):
            leaf = f"float_{len(student._parameters)}"
            student.register_parameter(leaf, nn.Parameter(quantizer().detach(), requires_grad=False))
            with student.graph.inserting_before(node):
                plain = student.graph.get_attr(leaf)
            plain.meta = dict(node.meta)
            node.replace_all_uses_with(plain)
        elif isinstance(quantizer, ActivationQuantizer):
            node.replace_all_uses_with(node.args[0])
        student.graph.erase_node(node)
    student.delete_all_unused_submodules()
    student.graph.lint()
    student.recompile()
    return student


def _call(model: EngineModel, images: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return model(images)

    return call
