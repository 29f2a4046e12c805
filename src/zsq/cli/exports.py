"""The commands around files for engines: export, bench-latency."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsq.amounts import bytes_text
from zsq.cli.arguments import DebugOption, JsonOption
from zsq.cli.summaries import evaluate_line
from zsq.cli.terminal import grid, only_result_on_stdout, print_json, print_parts, say
from zsq.errors import JobError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from zsq.export.latency import Latency
    from zsq.export.onnx import Export
    from zsq.export.openvino_ir import Representation
    from zsq.export.pt2 import Program
    from zsq.export.verify import OutputDifference

FORMATS = {  # with the ending of the file
    "onnx": ".onnx",
    "openvino": ".xml",
    "pt2": ".pt2",
    "executorch": ".pte",
}


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="onnx|openvino|pt2|executorch",
            help="kind of file: ONNX, OpenVINO's IR, a torch.export program, or an ExecuTorch program",
        ),
    ] = "onnx",
    target: Annotated[
        str | None,
        typer.Option(
            metavar="onnxruntime|openvino|tensorrt", help="the engine that is to run it; by default the first"
        ),
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(
            metavar="int2|int4|int8",
            help="narrowest integers to store; int8 runs faster, by default the smallest file",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="file to write; by default RUN/student.onnx, .xml, .pt2 or .pte"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a run as a file for an engine, after checking there that it computes the same."""
    if to not in FORMATS:
        raise UsageError(f"--to is one of {', '.join(FORMATS)}, got {to!r}.")
    file = out or run / f"student{FORMATS[to]}"
    if to in ("pt2", "executorch") and container is not None:
        raise UsageError("A torch.export or ExecuTorch program has one form. Leave out --container.")
    if to != "onnx" and target is not None:
        raise UsageError(f"--target is for ONNX files; --to {to} says already what is to run it.")
    if to == "openvino":
        with only_result_on_stdout():
            from zsq.export.openvino_ir import export_openvino

            representation = export_openvino(run, file, container=container, force=force)
        _show(representation.to_json(), _representation_summary(representation), as_json)
    elif to == "pt2":
        with only_result_on_stdout():
            from zsq.export.pt2 import export_pt2

            program = export_pt2(run, file, force=force)
        _show(program.to_json(), _program_summary(program, "The program against the student"), as_json)
    elif to == "executorch":
        with only_result_on_stdout():
            from zsq.export.executorch import export_executorch

            program = export_executorch(run, file, force=force)
        ending = f"To measure accuracy on labelled images: {evaluate_line(program.path, None)}"
        summary = _program_summary(program, f"{program.engine} against PyTorch", ending)
        _show(program.to_json(), summary, as_json)
    else:
        with only_result_on_stdout():
            from zsq.export.onnx import export_onnx

            found = export_onnx(run, file, target=target or "onnxruntime", container=container, force=force)
        _show(found.to_json(), _summary(found), as_json)


def bench_latency(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run folder")],
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="images a call")] = 1,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="of the engine")] = 1,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="calls of each network, in turns")] = 50,
    container: Annotated[
        str, typer.Option(metavar="int2|int4|int8", help="as for export; int8 is computed in integers")
    ] = "int8",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time a run in ONNX Runtime beside the same network in float32; RUN/latency.jsonl keeps the times."""
    with only_result_on_stdout():
        from zsq.export import latency

        found = latency.bench_latency(
            run, batch_size=batch_size, threads=threads, rounds=rounds, container=container
        )
        try:
            latency.keep_latency(found, run)
        except JobError as error:  # a folder that is only read
            say(f"Note: {error}")
    _show(found.to_json(), _latency_summary(found), as_json)


def _show(result: dict[str, Any], summary: "list[Table | str]", as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        print_parts(*summary)


def _latency_summary(found: "Latency") -> "list[Table | str]":
    fused, low, high = found.fused, *found.ratio_quartiles
    rows = [(f"{found.float_ms:.2f} ms", f"{found.quantized_ms:.2f} ms", f"{found.ratio:.2f}")]
    integer = (
        f"In integers: {fused.convolutions} of {fused.convolutions + fused.float_convolutions} convolutions, "
        f"{fused.additions} of {fused.additions + fused.float_additions} additions."
    )
    placed = "" if fused.complete else " Quantize with --placement engine for all of them."
    plural = "" if found.threads == 1 else "s"
    return [
        "",
        f"{found.engine}, CPU, {found.threads} thread{plural}, {found.batch_size} images a call, medians of "
        f"{found.rounds} calls in turns:",
        grid(("float32", f"quantized, {found.container}", "times as fast"), rows, right=(0, 1, 2)),
        f"Half of the turns gave {low:.2f} to {high:.2f} times.",
        f"{integer}{placed}",
    ]


def _summary(export: "Export") -> "list[Table | str]":
    check, inside = export.verification, export.in_openvino.outputs if export.in_openvino else ()
    rows = [
        *(_row(difference, "on") for difference in check.optimized),
        *(_row(difference, "off") for difference in check.plain),
        *(_row(difference, "OpenVINO") for difference in inside),
    ]
    head = ("output", "optimizations", "same class", "largest difference", "relative error")
    session: dict[str, Any] = check.session.to_json()
    runs = "It runs with the engine's default session options."
    if check.session != type(check.session)():
        runs = f"It needs these session options: {session}."
    return [
        "",
        f"{export.path} ({bytes_text(export.size)}), how to run it: {export.settings}",
        _compared(f"{check.engine} against PyTorch", check.num_images),
        grid(head, rows, right=(2, 3, 4)),
        *(f"Note: {note}." for note in export.notes),
        runs,
        f"To measure accuracy on labelled images: {evaluate_line(export.path, None)}",
    ]


def _representation_summary(representation: "Representation") -> "list[Table | str]":
    check, files = representation.check, f"{representation.path} and {representation.weights.name}"
    return [
        "",
        f"{files} ({bytes_text(representation.size)}), how to run it: {representation.settings}",
        _compared(f"{check.engine}, float32, against PyTorch", check.num_images),
        _outputs(check.outputs),
        *(f"Note: {note}." for note in representation.notes),
        f"To measure accuracy on labelled images: {evaluate_line(representation.path, None)}",
    ]


def _program_summary(program: "Program", compared: str, *ending: str) -> "list[Table | str]":
    return [
        "",
        f"{program.path} ({bytes_text(program.size)})",
        _compared(compared, program.num_images),
        _outputs(program.outputs),
        *(f"Note: {note}." for note in program.notes),
        *ending,
    ]


def _compared(what: str, num_images: int) -> str:
    return f"{what} on {num_images} of the run's images (not an accuracy):"


def _outputs(differences: "Sequence[OutputDifference]") -> "Table":
    head = ("output", "same class", "largest difference", "relative error")
    rows = [(name, *rest) for name, _, *rest in (_row(difference, "") for difference in differences)]
    return grid(head, rows, right=(1, 2, 3))


def _row(difference: "OutputDifference", optimizations: str) -> tuple[str, ...]:
    same, steps = difference.argmax_agreement, difference.max_steps
    return (
        difference.name,
        optimizations,
        "" if same is None else f"{same:.2f} %",
        "" if steps is None else f"{steps:.2g} steps",
        f"{difference.relative_error:.1e}",
    )
