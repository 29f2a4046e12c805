"""The commands that compute: quantize, synthesize, bench."""

from pathlib import Path
from typing import Annotated

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
    processes,
    read_filters,
    read_settings,
    read_teacher,
)
from zsq.cli.call import call
from zsq.cli.dry_run import show_forecast
from zsq.cli.logs import both, logged
from zsq.cli.measure import labelled, measure
from zsq.cli.summaries import evaluate_line, quantized_summary
from zsq.cli.terminal import only_result_on_stdout, print_json, print_parts, reported_progress, say
from zsq.errors import JobError, UsageError, ZsqError


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
        dataset = labelled(data, teacher.spec, teacher.output_shape) if data is not None else None
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
                measured = measure(networks, dataset, target, group, plain=as_json)
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
        from zsq.bench import run_bench
        from zsq.bench_folder import RESULTS, TABLE
        from zsq.distributed import started_by_torchrun

        if started_by_torchrun():
            raise UsageError("zsq bench spreads its rows by itself: give it --jobs N, without torchrun.")

        call.hint = f"Finished rows are kept; the same command goes on from there: {call.line()}"
        folder = run_bench(file, out=out, write=write, jobs=jobs, progress=say)
    print((folder / (RESULTS if as_json else TABLE)).read_text(encoding="utf-8").rstrip("\n"))


def _goes_on(folder: Path) -> str:
    return f"What was finished is kept in {folder}; the same command goes on from there: {call.line()}"
