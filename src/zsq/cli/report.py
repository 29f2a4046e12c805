"""The command that writes a page to look at."""

from pathlib import Path
from typing import Annotated

import typer

from zsq.amounts import bytes_text
from zsq.cli.arguments import DebugOption, JsonOption
from zsq.cli.terminal import only_result_on_stdout, print_json, print_parts


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN ...]", help="finished run folders")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="page to write; by default RUN/report.html, of several ./report.html"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write one self-contained HTML page of a run, or of several beside each other."""
    with only_result_on_stdout():
        from zsq.report.page import write_report
        from zsq.run import REPORT

        file = write_report(runs, out or (runs[0] / REPORT if len(runs) == 1 else Path(REPORT)), force=force)
    size = file.stat().st_size
    if as_json:
        print_json({"file": str(file), "bytes": size, "runs": [str(run) for run in runs]})
    else:
        print_parts(f"{file} ({bytes_text(size)}), to be opened in a browser")
