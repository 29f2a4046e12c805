"""`zsq report`: one HTML page of one or several runs, without scripts and without anything from elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from zsq._version import __version__
from zsq.errors import UsageError, import_extra
from zsq.files import check_free, write_atomic
from zsq.report import panels
from zsq.report.charts import dot_rows
from zsq.report.comparison import Difference, Summary, configuration_of, differences, run_labels
from zsq.report.exports import Exported, exported, latencies
from zsq.report.headline import Headline, headline
from zsq.report.panels import Panel
from zsq.report.placement import Step, placement
from zsq.report.sections import SECTIONS
from zsq.report.settings import Setting, settings_of
from zsq.run import Run, load_run

EXTRA = "report"
DAMAGE = (
    ArithmeticError,
    AttributeError,
    IndexError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class RunView:
    """All that the page shows of a run; `label` tells it from the others, "" if it is the only one."""

    label: str
    headline: Headline
    panels: dict[str, Panel]
    summary: Summary


def write_report(
    runs: Sequence[Run | str | Path] | Run | str | Path, path: str | Path, *, force: bool = False
) -> Path:
    """Write the report of one or several runs as one HTML file.

    Args:
        runs: finished runs or their folders. Exported files and their latency are found in folders only.
            With several the page shows them beside each other, and what differs from the first.
        path: of the file.
        force: replace it.

    Returns:
        `path`.

    Raises:
        UsageError: no run, a folder that is none or is damaged, or a file that exists already.
        JobError: the file cannot be written.
    """
    given = [runs] if isinstance(runs, (Run, str, Path)) else list(runs)
    if not given:
        raise UsageError("A report needs at least one run folder.")
    file = Path(path)
    check_free([file], force=force)
    jinja2: Any = import_extra("jinja2", EXTRA)
    loaded = [run if isinstance(run, Run) else load_run(run) for run in given]
    folders = [None if isinstance(run, Run) else Path(run) for run in given]
    try:
        labels = run_labels([run.record for run in loaded], [f.name if f else "" for f in folders])
    except DAMAGE as error:
        raise UsageError(f"A run folder is damaged: its run.json lacks {error}. Quantize again.") from error
    views = [_view(*each) for each in zip(loaded, folders, labels, strict=True)]
    found = differences([view.summary for view in views]) if len(views) > 1 else []
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = environment.from_string(_resource("page.html.j2")).render(
        style=_resource("page.css"),
        version=__version__,
        sections=SECTIONS,
        runs=views,
        first=views[0],
        titles=list(dict.fromkeys(title for view in views for title in view.summary.figures)),
        differences=[(d, _unit_chart(d)) for d in found],
    )
    write_atomic(file, text.encode())
    return file


def _view(run: Run, folder: Path | None, label: str) -> RunView:
    try:
        steps = placement(run.student)
        about = headline(run)
        found = {
            "images": panels.images(run),
            "batch_norm": panels.batch_norm(run),
            "units": panels.units(run),
            "rounding": panels.rounding(run, steps),
            "weights": panels.weights(run, steps),
            "activations": panels.activations(run, steps),
            "losses": panels.losses(run),
            "placement": _placement(steps),
            "exports": _exports(exported(folder, run.record), latencies(folder)),
            "settings": _settings(*settings_of(run.record)),
        }
        units = {
            str(unit["name"]): float(unit["snr"])
            for unit in run.record["results"]["units"]
            if panels.decibels(unit["snr"]) is not None
        }
        summary = Summary(
            label=label or about.title,
            seed=int(run.record["seed"]),
            network=str(run.record["model"]["sha256"]),
            configuration=configuration_of(run.record),
            figures=about.figures,
            units=units,
        )
    except DAMAGE as error:
        where = f"The run folder {folder}" if folder is not None else "The run"
        raise UsageError(
            f"{where} is damaged or from another version of zsq ({type(error).__name__}: {error}). "
            "Quantize again."
        ) from error
    return RunView(label, about, found, summary)


def _placement(steps: Sequence[Step]) -> Panel:
    layers = [step for step in steps if step.weights]
    kinds: dict[str, int] = {}
    for step in layers:
        kind = f"{step.weight_bits}-bit" if step.weight_bits else "float"
        kinds[kind] = kinds.get(kind, 0) + step.weights
    total = sum(kinds.values()) or 1
    parts = [f"{100 * count / total:.1f} % of the weights in {kind}" for kind, count in sorted(kinds.items())]
    return Panel(f"{len(layers)} layers: {', '.join(parts)}.", "placement", steps)


def _exports(files: Sequence[Exported], times: Sequence[dict[str, Any]]) -> Panel:
    if not files and not times:
        return Panel("None in the run folder: zsq export and zsq bench-latency put them there.")
    plurals = ["" if len(found) == 1 else "s" for found in (files, times)]
    count = f"{len(files)} file{plurals[0]}, {len(times)} timing{plurals[1]}."
    return Panel(count, "exports", {"files": files, "times": times})


def _settings(settings: Sequence[Setting], known: bool) -> Panel:
    if not known:
        return Panel("The recipe is none of zsq's own, so all settings are shown.", "settings", settings)
    changed = [s for s in settings if s.reason]
    summary = f"{len(changed)} of {len(settings)} settings differ from the recipe's own."
    return Panel(summary, "settings", settings)


def _unit_chart(difference: Difference) -> str:
    labels = ("difference",)
    return dot_rows(difference.units, labels=labels, unit="dB, right is better than the first run")


def _resource(name: str) -> str:
    return (resources.files("zsq.report") / name).read_text(encoding="utf-8")
