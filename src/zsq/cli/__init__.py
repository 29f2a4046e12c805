"""The command line: each command reads its arguments, makes one Python call and shows what came of it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from zsq._version import __version__
from zsq.allocator import keep_freed_memory
from zsq.cli import doctor, exports, jobs, lists, measure, publishing, report
from zsq.cli.arguments import DebugOption
from zsq.cli.call import begin_call, guarded, refused

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The console entry point; exits with 0 (done), 1 (job failed), 2 (wrong call) or 130 (stopped).

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    of_a_job = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if of_a_job and int(os.environ.get("RANK") or 0) > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # the first process of a job speaks for all
    begin_call(given)
    keep_freed_memory()
    # Else Ctrl-C is somebody else's, or ignored in the background.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = ours and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, _stop)
    try:
        code = typer.main.get_command(app).main(args=given, prog_name="zsq", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # else one of typer's own, whose class is not public
            raise
        code = refused(error)
    finally:
        if ours and signal.getsignal(signal.SIGINT) is _stop:  # after a Ctrl-C the process is about to end
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments is None and of_a_job:
        _end_at_once(code or 0)
    sys.exit(code or 0)


def _end_at_once(code: int) -> NoReturn:
    """End without the interpreter's own end, which threads of torch.distributed may turn into an abort."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _stop(number: int, frame: object) -> None:
    """Stop in order at the first Ctrl-C; a second one ends the process at once, as the system does it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _print_version(value: bool) -> None:
    if value:
        print(f"zsq {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Low-bit vision models from the trained model alone, without its data."""


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.callback()(_options)
for command in (
    jobs.quantize,
    jobs.synthesize,
    measure.evaluate,
    exports.export,
    exports.bench_latency,
    report.report,
    publishing.push,
    lists.recipes,
    lists.show,
    lists.models,
    jobs.bench,
    doctor.doctor,
):
    app.command()(guarded(command))
