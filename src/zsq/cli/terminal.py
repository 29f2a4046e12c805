"""What the commands show: progress and messages on stderr, tables on stdout."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from zsq.amounts import seconds_text
from zsq.progress import Callback, Progress

SECONDS_BETWEEN_LINES = 10.0
Clock = Callable[[], float]


def say(text: str) -> None:
    """One line on stderr, as it is."""
    print(text, file=sys.stderr, flush=True)


def print_parts(*parts: RenderableType) -> None:
    """Texts and tables on stdout; plain texts are not wrapped, so that paths and commands can be copied."""
    console = Console(highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(Text(part), soft_wrap=True)
        else:
            console.print(part)


def indented(text: str) -> RenderableType:
    """A paragraph four columns in, wrapped."""
    return Padding(Text(text), (0, 0, 0, 4))


def print_json(value: Any) -> None:
    """A result as JSON on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


@contextmanager
def only_result_on_stdout() -> Iterator[None]:
    """What anything prints in the meantime, such as a user's model file, goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


class Pace:
    """Time left in a stage, from the speed measured so far.

    Only the time between two events of one item counts: what an earlier run had finished comes as one event
    an item and would look infinitely fast.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._last: Progress | None = None
        self._at = 0.0
        self._seconds, self._steps = 0.0, 0

    def seconds_left(self, event: Progress) -> float | None:
        """Take notice of an event; the seconds that the rest of its stage takes, None while unknown."""
        now, last = self._clock(), self._last
        if last is None or starts_stage(last, event):
            self._seconds, self._steps = 0.0, 0
        elif last.item == event.item and not event.resumed:
            self._seconds += now - self._at
            self._steps += event.done - last.done
        self._last, self._at = event, now
        if not self._steps:
            return None
        return self._seconds / self._steps * (event.total - event.done)


def starts_stage(last: Progress, event: Progress) -> bool:
    """Whether `event` begins another stage than `last` was in; a stage may come twice."""
    another = event.stage != last.stage or event.total != last.total
    return another or event.done < last.done or (event.done == last.done and event.item != last.item)


def plain_lines(write: Callable[[str], None] = say, clock: Clock = time.monotonic) -> Callback:
    """A callback that writes a line when a stage begins or ends, and in between now and then."""
    pace = Pace(clock)
    last: Progress | None = None
    written = 0.0

    def callback(event: Progress) -> None:
        nonlocal last, written
        left, now = pace.seconds_left(event), clock()
        begins = last is None or starts_stage(last, event)
        ends = event.done == event.total and (last is None or begins or last.done < event.total)
        if begins or ends or now - written >= SECONDS_BETWEEN_LINES:
            write(_line(event, left))
            written = now
        last = event

    return callback


def _line(event: Progress, left: float | None) -> str:
    what = "images" if event.stage == "evaluate" else "steps"
    parts = [f"{event.stage}: {event.item}", f"{event.done} of {event.total} {what}"]
    if "loss" in event.values:
        parts.append(f"loss {event.values['loss']:.4g}")
    if event.resumed:
        parts.append("taken over from the interrupted run")
    if left is not None and event.done < event.total:
        parts.append(f"about {seconds_text(left)} left")
    return ", ".join(parts)


@contextmanager
def reported_progress(*, plain: bool) -> Iterator[Callback]:
    """The callback for a job: bars if stderr is a terminal and not `plain`, otherwise lines."""
    console = Console(stderr=True)
    if plain or not (console.is_interactive and sys.stderr.isatty()):
        with said_notes(say):
            yield plain_lines()
        return
    with Bars(*columns(), console=console) as bars, said_notes(console.print):
        yield stage_bars(bars)


@contextmanager
def said_notes(show: Callable[[str], None]) -> Iterator[None]:
    """What the library logs as worth knowing is shown."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            label = "Error" if record.levelno >= logging.ERROR else "Note"
            show(f"{label}: {record.getMessage()}")

    logger, handler = logging.getLogger("zsq"), Shown(logging.INFO)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def columns() -> tuple[ProgressColumn, ...]:
    """What a bar shows: stage, share done, time left, and the item in work."""
    return (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        _TimeLeft(),
        TextColumn("{task.fields[item]}", markup=False),
    )


def stage_bars(bars: Bars) -> Callback:
    """A callback that keeps one bar a stage up to date."""
    pace = Pace()
    last: Progress | None = None
    task: TaskID = bars.add_task("prepare", total=None, item="", finish_at=None)

    def callback(event: Progress) -> None:
        nonlocal last, task
        left = pace.seconds_left(event)
        if last is None or starts_stage(last, event):
            if last is None:
                bars.remove_task(task)
            else:
                bars.update(task, completed=last.total, item="")
            name = f"evaluate {event.item}" if event.stage == "evaluate" else event.stage
            task = bars.add_task(name, total=event.total, item="", finish_at=None)
        loss = f", loss {event.values['loss']:.4g}" if "loss" in event.values else ""
        item = "" if event.done == event.total else event.item + loss
        finish_at = None if left is None else time.monotonic() + left
        bars.update(task, completed=event.done, item=item, finish_at=finish_at)
        last = event

    return callback


class _TimeLeft(ProgressColumn):
    """Time left of the running stage, time taken of a finished one."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"took {seconds_text(task.finished_time or 0.0)}")
        finish_at = task.fields["finish_at"]
        if finish_at is None:
            return Text("")
        return Text(f"{seconds_text(max(0.0, finish_at - time.monotonic()))} left")


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> Table:
    """A table of texts, taken literally; columns `right` are right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, title in enumerate(head):
        table.add_column(title, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
