"""The command that measures, and what quantize needs of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsq.cli.arguments import (
    DebugOption,
    DeviceOption,
    InputSizeOption,
    JsonOption,
    MeanOption,
    StdOption,
    WeightsOption,
    is_run,
    processes,
    read_teacher,
)
from zsq.cli.summaries import diagnostics_summary, measured_summary
from zsq.cli.terminal import only_result_on_stdout, print_json, print_parts, reported_progress, say
from zsq.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from zsq.data import Dataset
    from zsq.distributed import Group
    from zsq.progress import Callback
    from zsq.teacher import ModelSpec

BATCH_SIZE = 128  # images at once when accuracy is measured
POWER_STEPS = 10  # of the power iteration for the largest eigenvalue


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL|FILE",
            help="a run folder, whose student is measured, a model, or an exported .onnx, .xml or .pte file",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="labelled images: folder by class, npz, zip with labels.csv, hf:NAME"
        ),
    ],
    teacher: Annotated[bool, typer.Option("--teacher", help="of a run, measure the teacher too")] = False,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="images at once")] = BATCH_SIZE,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="only N of the images")] = None,
    diagnostics: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="of a run, also flatness, gradient alignment and generalisation on N of the images",
        ),
    ] = 0,
    device: DeviceOption = "cpu",
    weights: WeightsOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure the accuracy on real labelled images; nothing is written."""
    with only_result_on_stdout(), processes(device) as (group, target):
        from zsq.run import load_run

        networks: dict[str, nn.Module] = {}
        exported, from_run = Path(model).suffix in (".onnx", ".xml", ".pte"), is_run(model)
        if diagnostics and not from_run:
            raise UsageError(
                f"--diagnostics compares the student of a run with its teacher, and {model} is no run folder."
            )
        if exported:
            _refuse_options(f"{model} is a file that runs by itself", weights, input_size, mean, std)
            if teacher or target != "cpu":
                raise UsageError(
                    f"{model} is measured in its engine on the CPU. Leave out --teacher and --device."
                )
            networks["student"], spec, output_shape = _engine(model)
        elif teacher or diagnostics or not from_run:
            loaded = read_teacher(model, weights, input_size, mean, std)
            if teacher or not from_run:
                networks["teacher"] = loaded.module
            spec, output_shape = loaded.spec, loaded.output_shape
        else:
            _refuse_options(
                f"{model} is a run, whose student knows its weights and its input",
                weights,
                input_size,
                mean,
                std,
            )
        if from_run:
            run = load_run(model)
            networks["student"] = run.student
            spec, output_shape = run.spec, tuple(run.student(run.images[:2]).shape[1:])
        dataset = labelled(data, spec, output_shape)
        measured = measure(
            networks, dataset, target, group, plain=as_json, batch_size=batch_size, limit=limit
        )
        found: dict[str, Any] = {}
        if diagnostics and group.rank == 0:
            from zsq.diagnostics import diagnose

            say(f"diagnostics on {min(diagnostics, len(dataset))} of the images")
            others = dataset.sample(diagnostics)
            found = diagnose(run, loaded, others, power_steps=POWER_STEPS, device=target).to_json()
    if as_json:
        print_json({"model": model, "data": data, **measured, **({"diagnostics": found} if found else {})})
    else:
        print_parts(*measured_summary({"data": data, **measured}))
        if found:
            print_parts(*diagnostics_summary(found))


def labelled(data: str, spec: "ModelSpec", output_shape: tuple[int, ...]) -> "Dataset":
    """Labelled images that fit a classifier's input and classes."""
    from zsq.data import check_labels, open_dataset

    if len(output_shape) != 1:
        raise UsageError(
            f"The model answers an image with an output of shape {output_shape}. Accuracy needs a "
            "classifier, which gives one number a class."
        )
    dataset = open_dataset(data, spec)
    check_labels(dataset, output_shape[0])
    return dataset


def measure(
    networks: "Mapping[str, nn.Module]",
    dataset: "Dataset",
    device: str,
    group: "Group",
    *,
    plain: bool,
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
) -> dict[str, Any]:
    """{"student": {"top1": ..., "top5": ..., "num_images": ...}} for every network by name."""
    from zsq.evaluate import accuracy
    from zsq.graph.capture import moved
    from zsq.progress import Progress

    count = min(limit or len(dataset), len(dataset))

    def one(name: str, network: "nn.Module", progress: "Callback") -> dict[str, Any]:
        batches = dataset.batches(batch_size, limit=limit, every=group.size, start=group.rank)

        def report(done: int) -> None:  # the other processes are about as far with theirs
            progress(Progress("evaluate", name, min(done * group.size, count), count))

        on = moved(network, device)
        return accuracy(on, batches, device=device, progress=report, group=group).to_json()

    with reported_progress(plain=plain) as progress:
        return {name: one(name, network, progress) for name, network in networks.items()}


def _refuse_options(reason: str, *options: Path | str | None) -> None:
    """Refuse the options that describe a model."""
    if any(option is not None for option in options):
        raise UsageError(f"{reason}. Leave out --weights, --input-size, --mean and --std.")


def _engine(path: str) -> "tuple[nn.Module, ModelSpec, tuple[int, ...]]":
    """An exported file in its engine, what its images must look like, and the shape of its output."""
    import torch

    from zsq.export.engine import open_engine
    from zsq.export.executorch import open_executorch
    from zsq.export.openvino_ir import open_representation

    openers = {".xml": open_representation, ".pte": open_executorch}
    file = openers.get(Path(path).suffix, open_engine)(path)
    outputs = file.model(torch.zeros(2, *file.spec.input_size))
    if isinstance(outputs, tuple):
        raise UsageError(f"{path} has {len(outputs)} outputs. Accuracy needs a classifier, which has one.")
    return file.model, file.spec, tuple(outputs.shape[1:])
