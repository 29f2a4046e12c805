"""The commands of `zsq`: each reads its arguments, makes one Python call and shows what came of it."""

import contextlib
import functools
import json
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from zsq import terminal
from zsq._version import __version__
from zsq.arguments import (
    BitsOption,
    BudgetOption,
    DeviceOption,
    EndsOption,
    ForceOption,
    InputSizeOption,
    JsonOption,
    MeanOption,
    ModelArgument,
    OutOption,
    RecipeOption,
    SeedOption,
    SetOption,
    StdOption,
    WeightsOption,
    default_out,
    is_run,
    read_device,
    read_settings,
    read_teacher,
)
from zsq.errors import JobError, ZsqError

if TYPE_CHECKING:
    from torch import nn


P = ParamSpec("P")

app = typer.Typer(
    name="zsq",
    help="Low-bit vision models from the trained model alone, without its data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclass
class _Call:
    """What the handling of errors needs to know of the call in progress."""

    arguments: Sequence[str] = field(default_factory=lambda: sys.argv[1:])
    debug: bool = False
    hint: str = ""  # said when the user stops the command

    def line(self, *, without: Sequence[str] = ()) -> str:
        """The command line, to be pasted into a shell."""
        return shlex.join(["zsq", *(a for a in self.arguments if a not in without)])


_call = _Call()


def main(arguments: Sequence[str] | None = None) -> None:
    """The console entry point; leaves with exit code 0 (done), 1 (job failed), 2 (wrong call) or 130 (stopped).

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    global _call
    given = list(sys.argv[1:] if arguments is None else arguments)
    _call = _Call(given)
    try:
        typer.main.get_command(app).main(args=given, prog_name="zsq")
    except KeyboardInterrupt:
        sys.exit(130)


def _guarded(function: Callable[P, None]) -> Callable[P, None]:
    """The function with every exception turned into one paragraph on stderr and an exit code."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            _complain(f"Stopped. {_call.hint}".strip())
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `zsq recipes | head`
            raise
        except ZsqError as error:
            _complain(f"Error: {error}")
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            text = " ".join(str(error).split())
            again = "" if _call.debug else " Run again with --debug for the traceback."
            _complain(f"Error: {type(error).__name__}: {text}{'' if text.endswith('.') else '.'}{again}")
            raise typer.Exit(1) from None

    return guarded


def _complain(text: str) -> None:
    if _call.debug:
        traceback.print_exc()
    terminal.say(text)


def _turn_on_debug(value: bool) -> bool:
    _call.debug |= value
    return value


def _print_version(value: bool) -> None:
    if value:
        terminal.show(f"zsq {__version__}")
        raise typer.Exit


DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_turn_on_debug, help="show the traceback of an error")
]


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
    debug: DebugOption = False,
) -> None:
    pass


@app.command()
@_guarded
def quantize(
    model: ModelArgument = "digits",
    recipe: RecipeOption = "genie",
    bits: BitsOption = "W4A4",
    ends: EndsOption = None,
    budget: BudgetOption = "standard",
    settings: SetOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    out: OutOption = None,
    force: ForceOption = False,
    weights: WeightsOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    images: Annotated[
        Path | None, typer.Option(metavar="PATH", help="calibrate on these images in place of synthetic ones")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="labelled images: measure the accuracy before and after"),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Quantize a model without its data.

    An interrupted run is continued by the same command.
    """
    with _prints_on_stderr(as_json):
        import zsq

        target = read_device(device)
        overrides = read_settings(settings)
        teacher = read_teacher(model, weights, input_size, mean, std)
        folder = out or default_out("runs", teacher, recipe, bits.upper(), seed)
        given = _load_images(images, teacher)
        dataset = _labelled(data, teacher) if data is not None else None
        terminal.say(
            f"{teacher.name}, recipe {recipe}, {bits.upper()}, budget {budget}, seed {seed} -> {folder}"
        )
        _call.hint = (
            f"What was finished is kept in {folder}; the same command goes on from there: "
            f"{_call.line(without=('--force',))}"
        )
        with terminal.reported_progress(plain=as_json) as progress:
            run = zsq.quantize(
                teacher,
                recipe=recipe,
                bits=bits,
                ends=ends,
                budget=budget,
                overrides=overrides,
                images=given,
                seed=seed,
                device=target,
                out=folder,
                force=force,
                progress=progress,
                command=_call.line(),
            )
        if dataset is not None:
            _call.hint = f"The run in {folder} is complete; measure it with: {_evaluate_line(folder, data)}"
            try:
                with terminal.reported_progress(plain=as_json) as progress:
                    run.record["results"]["measured"] = {
                        "data": str(data),
                        "teacher": _measure(teacher.module, "teacher", dataset, target, progress),
                        "student": _measure(run.student, "student", dataset, target, progress),
                    }
            except ZsqError as error:
                raise JobError(f"{error} {_call.hint}") from error
            from zsq.run import write_record

            write_record(folder, run.record)
    if as_json:
        _print_json(run.record)
        return
    files = f"Files: {folder} (student.safetensors, images.safetensors, images.png, run.json, metrics.jsonl)"
    evaluate_line = _evaluate_line(folder, data)
    terminal.show(
        *terminal.quantized_summary(run.record),
        files,
        f"Evaluate on labelled images: {evaluate_line}",
        f"Use it in Python: zsq.load_run({str(folder)!r}).student",
    )


@app.command()
@_guarded
def synthesize(
    model: ModelArgument = "digits",
    recipe: RecipeOption = "genie",
    budget: BudgetOption = "standard",
    settings: SetOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    out: OutOption = None,
    force: ForceOption = False,
    weights: WeightsOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make only the synthetic images of a recipe."""
    with _prints_on_stderr(as_json):
        import zsq

        target = read_device(device)
        overrides = read_settings(settings)
        teacher = read_teacher(model, weights, input_size, mean, std)
        folder = out or default_out("images", teacher, recipe, "", seed)
        terminal.say(f"images of {teacher.name}, recipe {recipe}, budget {budget}, seed {seed} -> {folder}")
        _call.hint = (
            f"What was finished is kept in {folder}; the same command goes on from there: "
            f"{_call.line(without=('--force',))}"
        )
        with terminal.reported_progress(plain=as_json) as progress:
            made = zsq.synthesize_images(
                teacher,
                recipe=recipe,
                budget=budget,
                overrides=overrides,
                seed=seed,
                device=target,
                out=folder,
                force=force,
                progress=progress,
            )
    if as_json:
        _print_json({"out": str(folder), "shape": list(made.shape)})
        return
    count, *size = made.shape
    terminal.show(
        f"{count} images of {'x'.join(map(str, size))}, normalised as the model's input: "
        f"{folder / 'images.safetensors'} (tensor 'images')",
        f"Picture: {folder / 'images.png'}",
    )


@app.command()
@_guarded
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="run folder (its student is measured), or a model")
    ],
    data: Annotated[
        Path,
        typer.Option(metavar="PATH", help="labelled images: folder by class, npz, or zip with labels.csv"),
    ],
    teacher: Annotated[bool, typer.Option("--teacher", help="of a run, measure the teacher too")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="images at once")] = 128,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="only the first N images")] = None,
    device: DeviceOption = "cpu",
    weights: WeightsOption = None,
    input_size: InputSizeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure the accuracy on real labelled images; nothing is written."""
    from zsq.run import load_run

    with _prints_on_stderr(as_json):
        target = read_device(device)
        networks: dict[str, nn.Module] = {}
        if is_run(model):
            run = load_run(model)
            networks["student"] = run.student
            spec, classes = run.spec, _num_classes(run.student, run.spec.input_size)
        if "student" not in networks or teacher:
            loaded = read_teacher(model, weights, input_size, mean, std)
            networks = {"teacher": loaded.module, **networks}
            spec, classes = loaded.spec, _num_classes(loaded.module, loaded.spec.input_size)
        dataset = _open(data, spec, classes)
        measured: dict[str, Any] = {"data": str(data)}
        with terminal.reported_progress(plain=as_json) as progress:
            for who, network in networks.items():
                measured[who] = _measure(network, who, dataset, target, progress, batch_size, limit)
    if as_json:
        _print_json({"model": model, **measured})
    else:
        terminal.show(*terminal.measured_summary(measured))


@app.command()
@_guarded
def recipes(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the recipes."""
    from zsq.recipes import RECIPES

    if as_json:
        _print_json([{"name": recipe.name, "paper": recipe.paper} for recipe in RECIPES.values()])
        return
    rows = [(recipe.name, recipe.paper) for recipe in RECIPES.values()]
    terminal.show(terminal.grid(("recipe", "what it is"), rows), "", "All settings of one: zsq show RECIPE")


@app.command()
@_guarded
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="one of `zsq recipes`")],
    bits: BitsOption = "W4A4",
    ends: EndsOption = None,
    budget: BudgetOption = "standard",
    settings: SetOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show every setting of a recipe, by the name that --set takes, as `zsq quantize` would use it."""
    from zsq.pipeline import compose_recipe
    from zsq.recipe_help import recipe_docstring, recipe_settings

    composed = compose_recipe(recipe, bits=bits, ends=ends, budget=budget, overrides=read_settings(settings))
    found = recipe_settings(composed)
    if as_json:
        listed = {s.name: {"value": s.value, "type": s.type, "meaning": s.meaning} for s in found}
        _print_json({"name": composed.name, "paper": composed.paper, "budget": budget, "settings": listed})
        return
    rows = [
        (s.name, str(s.value).lower() if s.value in (True, False, None) else str(s.value), s.type, s.meaning)
        for s in found
    ]
    terminal.show(
        *recipe_docstring(composed.name).splitlines(),
        "",
        f"Settings with --bits {bits.upper()} --budget {budget}:",
        "",
        terminal.grid(("setting", "value", "type", "meaning"), rows),
    )


@app.command()
@_guarded
def models(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List what MODEL can be."""
    from zsq.models import models as entries

    rows = [(e.model, e.input_size, e.description) for e in entries()]
    if as_json:
        _print_json([dict(zip(("model", "input_size", "description"), row, strict=True)) for row in rows])
    else:
        terminal.show(terminal.grid(("MODEL", "input size", "what it is"), rows))


@app.command()
@_guarded
def bench(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="networks, recipes, bits and seeds, as TOML")],
    out: Annotated[
        Path | None, typer.Option(help="folder for rows and the table; default runs/bench-NAME")
    ] = None,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="also write the table there")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare recipes on networks, bits and seeds; finished rows are kept, so a stopped one goes on."""
    with _prints_on_stderr(as_json):
        from zsq.bench import RESULTS, TABLE, run_bench

        _call.hint = f"Finished rows are kept; the same command goes on from there: {_call.line()}"
        folder = run_bench(file, out=out, write=write, progress=terminal.say)
    name = RESULTS if as_json else TABLE
    text = (folder / name).read_text(encoding="utf-8")
    terminal.show(text.rstrip("\n"), *([] if as_json else ["", f"Files: {folder}"]))


@contextlib.contextmanager
def _prints_on_stderr(active: bool) -> Iterator[None]:
    """With --json, what a user's model file prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _evaluate_line(folder: Path, data: Path | None) -> str:
    path = "PATH" if data is None else shlex.quote(str(data))
    return f"zsq evaluate {shlex.quote(str(folder))} --data {path}"
