"""What `zsq quantize --dry-run` shows: stages, time and memory of the run that it does not make."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsq.amounts import bytes_text, seconds_text
from zsq.cli.arguments import processes, read_teacher
from zsq.cli.terminal import grid, only_result_on_stdout, print_json, print_parts, say

if TYPE_CHECKING:
    from rich.table import Table

    from zsq.forecast import Forecast

ModelOptions = tuple[str, Path | None, str | None, str | None, str | None]  # as `read_teacher` takes them


def show_forecast(
    model: ModelOptions, *, device: str, images: str | None, as_json: bool, **arguments: Any
) -> None:
    """Make the trial and print what follows from it; `arguments` are those of `forecast`."""
    with only_result_on_stdout(), processes(device) as (_, target):
        from zsq.data import load_images
        from zsq.forecast import TRIAL_STEPS, forecast

        teacher = read_teacher(*model)
        given = load_images(images, teacher.spec) if images is not None else None
        say(f"a trial of {TRIAL_STEPS} steps of each stage; nothing is written")
        found = forecast(teacher, images=given, device=target, **arguments)
    if as_json:
        print_json(found.to_json())
    else:
        print_parts(*_summary(found))


def _summary(found: "Forecast") -> "list[Table | str]":
    rows = [(s.name, f"{s.steps:,}" if s.steps else "", seconds_text(s.seconds)) for s in found.stages]
    rows.append(("total", "", f"about {seconds_text(found.seconds)}"))
    return [
        "",
        grid(("stage", "steps", "estimated time"), rows, right=(1, 2)),
        f"Estimated from a trial that took {seconds_text(found.trial_seconds)}; evaluation is not in it.",
        f"Memory of tensors, besides the program itself: {bytes_text(found.synthesis_bytes)} to make images, "
        f"{bytes_text(found.reconstruction_bytes)} to learn units. Tensors between units take "
        f"{bytes_text(found.cache_bytes)}; with --memory below that they are kept in files.",
        *(f"Note: {note}." for note in found.notes),
        "Nothing was written.",
    ]
