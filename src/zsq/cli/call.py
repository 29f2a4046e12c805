"""The call in progress, and what becomes of its errors: one paragraph on stderr and an exit code."""

import functools
import shlex
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import typer

from zsq.cli.terminal import say
from zsq.errors import ZsqError

P = ParamSpec("P")


@dataclass
class Call:
    """The call in progress.

    Attributes:
        arguments: the command line without the program's name.
        debug: whether errors show their traceback.
        hint: what to say when the user stops the command.
    """

    arguments: Sequence[str] = ()
    debug: bool = False
    hint: str = ""

    def line(self) -> str:
        """The command line, to be pasted into a shell."""
        return shlex.join(["zsq", *self.arguments])


call = Call()


def begin_call(arguments: Sequence[str]) -> None:
    """Forget the call before."""
    call.arguments, call.debug, call.hint = tuple(arguments), False, ""


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """The command with every exception turned into one paragraph on stderr and an exit code."""

    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            _complain(f"Stopped. {call.hint}".rstrip())
            raise typer.Exit(130) from None
        except BrokenPipeError:  # as in `zsq recipes | head -1`; typer ends quietly
            raise
        except ZsqError as error:
            _complain(f"Error: {error}")
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            text = str(error).strip().rstrip(".")
            again = "" if call.debug else " Run again with --debug for the traceback."
            _complain(f"Error: {type(error).__name__}{': ' if text else ''}{text}.{again}")
            raise typer.Exit(1) from None

    return command


def refused(error: Any) -> int:
    """Say what typer found wrong with the call; the exit code."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        say(context.get_help() if context is not None else "")  # typer may have printed it by itself
    else:
        where = context.command_path if context is not None else "zsq"
        say(one_line(f"Error: {error.format_message().rstrip('.')}. See {where} --help."))
    return 2


def _complain(text: str) -> None:
    if call.debug:
        traceback.print_exc()
    say(one_line(text))


def one_line(text: str) -> str:
    """A message as one paragraph; what a terminal would obey, as colours in a file's name, is escaped."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
