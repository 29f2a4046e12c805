"""The commands that compute: quantize, synthesize, evaluate, bench."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zsq.cli.arguments import (
    BitsOption,
    BudgetOption,
    DebugOption,
    DeviceOption,
    EndsOption,
    FilterOption,
    ForceOption,
    InputSizeOption,
    JsonOption,
    MeanOption,
    ModelArgument,
    PlacementOption,
    RecipeOption,
    SeedOption,
    SetOption,
    StdOption,
    WeightsOption,
    default_out,
    is_run,
    processes,
    read_filters,
    read_settings,
    read_teacher,
)
from zsq.cli.call import call
from zsq.cli.dry_run import show_forecast
from zsq.cli.logs import both, logged
from zsq.cli.terminal import (
    diagnostics_summary,
    evaluate_line,
    measured_summary,
    only_result_on_stdout,
    print_json,
    print_parts,
    quantized_summary,
    reported_progress,
    say,
)
from zsq.errors import JobError, UsageError, ZsqError

if TYPE_CHECKING:
    from torch import nn

    from zsq.data import Dataset
    from zsq.distributed import Group
    from zsq.progress import Callback
    from zsq.teacher import ModelSpec

BATCH_SIZE = 128  # images at once when accuracy is measured
POWER_STEPS = 10  # of the power iteration for the largest eigenvalue


def quantize(
    model: ModelArgument = "digits",
    recipe: RecipeOption = "genie",
    bits: BitsOption = "W4A4",
    ends: EndsOption = None,
    placement: PlacementOption = None,
    budget: BudgetOption = "standard",
    settings: SetOption = None,
    filters: FilterOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="folder to write; by default runs/MODEL-RECIPE-BITS[-engine][-seedN]"
        ),
    ] = None,
    force: ForceOption = False,
    weights: WeightsOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    images: Annotated[
        str | None, typer.Option(metavar="PATH", help="calibrate on these images, in place of synthetic ones")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="labelled images to measure accuracy on, before and after"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="4GiB: tensors between units that take more are kept in files"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only estimate time and memory, from a few steps of each stage")
    ] = False,
    log: Annotated[
        str | None, typer.Option(metavar="tensorboard", help="write losses as events into RUN/tensorboard")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Quantize a model without its data. The same command continues an interrupted run."""
    if dry_run:
        show_forecast(
            (model, weights, input_size, mean, std),
            device=device,
            images=images,
            as_json=as_json,
            recipe=recipe,
            bits=bits,
            ends=ends,
            placement=placement,
            budget=budget,
            overrides={**read_filters(filters), **read_settings(settings)},
            memory=memory,
        )
        return
    with only_result_on_stdout(), processes(device) as (group, target):
        import zsq
        from zsq.data import load_labelled_images
        from zsq.run import write_record

        overrides = {**read_filters(filters), **read_settings(settings)}
        composed = zsq.compose_recipe(
            recipe, bits=bits, ends=ends, placement=placement, budget=budget, overrides=overrides
        )
        bits = composed.scheme.bits
        teacher = read_teacher(model, weights, input_size, mean, std)
        label = bits if composed.scheme.placement == "research" else f"{bits}-{composed.scheme.placement}"
        folder = out or default_out("runs", teacher, recipe, label, seed)
        given, labels = None, None
        if images is not None:
            shape = teacher.output_shape
            given, labels = load_labelled_images(images, teacher.spec, shape[0] if len(shape) == 1 else None)
        dataset = _labelled(data, teacher.spec, teacher.output_shape) if data is not None else None
        say(f"{teacher.name}, recipe {recipe}, {label}, budget {budget}, seed {seed} -> {folder}")
        call.hint = _goes_on(folder)
        kept = log if group.rank == 0 else None
        with reported_progress(plain=as_json) as shown, logged(kept, folder) as written:
            run = zsq.quantize(
                teacher,
                recipe=recipe,
                bits=bits,
                ends=ends,
                placement=placement,
                budget=budget,
                overrides=overrides,
                images=given,
                image_labels=labels,
                seed=seed,
                device=target,
                out=folder,
                force=force,
                progress=both(shown, written),
                command=call.line(),
                memory=memory,
                group=group,
            )
        if dataset is not None and not run.record["results"]["measured"]:
            call.hint = f"The run in {folder} is complete; to measure it: {evaluate_line(folder, data)}"
            networks = {"teacher": teacher.module, "student": run.student}
            try:
                measured = _measure(networks, dataset, target, group, plain=as_json)
            except ZsqError as error:
                raise JobError(f"{error} {call.hint}") from error
            run.record["results"]["measured"] = {"data": data, **measured}
            group.first(lambda: write_record(folder, run.record))
    if as_json:
        print_json(run.record)
    else:
        print_parts(*quantized_summary(run.record, folder, data))


def synthesize(
    model: ModelArgument = "digits",
    recipe: RecipeOption = "genie",
    bits: Annotated[
        str | None, typer.Option(metavar="BITS", help="for recipes whose images depend on them: sadag")
    ] = None,
    ends: EndsOption = None,
    budget: BudgetOption = "standard",
    settings: SetOption = None,
    filters: FilterOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(metavar="IMAGES", help="folder to write; by default images/MODEL-RECIPE[-seedN]"),
    ] = None,
    force: ForceOption = False,
    weights: WeightsOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make only the synthetic images of a recipe."""
    with only_result_on_stdout(), processes(device) as (group, target):
        import zsq

        overrides = {**read_filters(filters), **read_settings(settings)}
        zsq.compose_recipe(recipe, bits=bits, ends=ends, budget=budget, overrides=overrides)
        teacher = read_teacher(model, weights, input_size, mean, std)
        folder = out or default_out("images", teacher, recipe, bits or "", seed)
        say(f"images for {teacher.name}, recipe {recipe}, budget {budget}, seed {seed} -> {folder}")
        call.hint = _goes_on(folder)
        with reported_progress(plain=as_json) as progress:
            made = zsq.synthesize_images(
                teacher,
                recipe=recipe,
                bits=bits,
                ends=ends,
                budget=budget,
                overrides=overrides,
                seed=seed,
                device=target,
                out=folder,
                force=force,
                progress=progress,
                group=group,
            )
    if as_json:
        print_json({"out": str(folder), "shape": list(made.shape)})
        return
    count, *size = made.shape
    print_parts(
        f"{count} images of {'x'.join(map(str, size))}, normalised as the model takes them: "
        f"{folder / 'images.safetensors'} (tensor 'images')",
        f"As a picture: {folder / 'images.png'}",
    )


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
        dataset = _labelled(data, spec, output_shape)
        measured = _measure(
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


def bench(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="networks, recipes, bits and seeds, as TOML")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="folder for rows and tables; by default runs/bench-NAME"),
    ] = None,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="also write the table there")] = None,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="rows at a time, a process each")] = 1,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare recipes over networks, bits and seeds. The same command continues an interrupted one."""
    with only_result_on_stdout():
        from zsq.bench import RESULTS, TABLE, run_bench
        from zsq.distributed import started_by_torchrun

        if started_by_torchrun():
            raise UsageError("zsq bench spreads its rows by itself: give it --jobs N, without torchrun.")

        call.hint = f"Finished rows are kept; the same command goes on from there: {call.line()}"
        folder = run_bench(file, out=out, write=write, jobs=jobs, progress=say)
    print((folder / (RESULTS if as_json else TABLE)).read_text(encoding="utf-8").rstrip("\n"))


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


def _goes_on(folder: Path) -> str:
    return f"What was finished is kept in {folder}; the same command goes on from there: {call.line()}"


def _labelled(data: str, spec: "ModelSpec", output_shape: tuple[int, ...]) -> "Dataset":
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


def _measure(
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
