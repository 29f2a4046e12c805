"""Charts as HTML and inline SVG without scripts: they stretch with the page, texts and lines keep their size.

Colours are classes s0, s1, ... of the page's style sheet, so that light and dark need one drawing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

SIZE = 1000  # of the drawing in both directions, stretched to the plot
FEW_LEVELS = 16  # up to so many levels of a quantizer are drawn one by one
MANY_SEGMENTS = 40  # with more, boundaries between them are not drawn


@dataclass(frozen=True)
class Series:
    """A quantity over steps: segments of (x, y) that are not joined with one another."""

    label: str
    segments: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Row:
    """A line of a dot chart.

    Attributes:
        label: what it is about.
        dots: (series, value); None for a value that there is not.
        text: at its end.
        joined: whether a bar joins the first two dots.
    """

    label: str
    dots: Sequence[tuple[int, float | None]]
    text: str = ""
    joined: bool = False


@dataclass(frozen=True)
class Histogram:
    """Counts over [low, high] with a grid of levels.

    Attributes:
        counts: of equal bins.
        low, high: their ends.
        levels: of the quantizer, in the same units.
        codes: how often each level is stored; empty if it is not known.
        rare: heights are square roots, so that rare values can be seen.
    """

    counts: Sequence[float]
    low: float
    high: float
    levels: Sequence[float] = ()
    codes: Sequence[float] = field(default=())
    rare: bool = False


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= count + 0.5)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with halves and fifths where they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    found = [10.0**k for k in range(first, last + 1, stride) if low <= 10.0**k <= high]
    if len(found) >= 3:
        return found
    finer = [f * 10.0**k for k in range(first, last + 1) for f in (1, 2, 5)]
    return [value for value in finer if low <= value <= high] or [low]


def line_chart(series: Sequence[Series], *, about: str, x_label: str = "steps") -> str:
    """Curves over steps; logarithmic where values are positive and span more than a factor of ten."""
    points = [p for s in series for segment in s.segments for p in segment]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    log = min(ys) > 0 and max(ys) / min(ys) > 10
    left, right = min(xs), max(max(xs), min(xs) + 1)
    low, high = (min(ys), max(ys)) if log else (min(0.0, *ys), max(ys))
    if not high > low:
        low, high = (low / 2, high * 2) if log else (low, low + 1)

    def across(x: float) -> float:
        return (x - left) / (right - left)

    def up(y: float) -> float:
        return math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)

    y_ticks = log_ticks(low, high) if log else ticks(low, high)
    body = [_line(0, up(t), 1, up(t), "grid") for t in y_ticks]
    starts = sorted({segment[0][0] for s in series for segment in s.segments if segment})[1:]
    if len(starts) < MANY_SEGMENTS:
        body += [_line(across(x), 0, across(x), 1, "grid part") for x in starts]
    for index, one in reversed(list(enumerate(series))):
        for segment in one.segments:
            drawn = segment if len(segment) > 1 else [*segment, *segment]
            path = " ".join(f"{_x(across(x))},{_y(up(y))}" for x, y in drawn)
            body.append(f'<polyline class="s{index}" points="{path}"/>')
    labels = [f'<span class="y" style="top:{_percent(1 - up(t))}">{number(t)}</span>' for t in y_ticks]
    labels += [
        f'<span class="x" style="left:{_percent(across(t))}">{number(t)}</span>'
        for t in ticks(left, right)
        if t >= left
    ]
    return _figure("lines", about, body, labels) + legend([s.label for s in series], note=x_label)


def histogram(chart: Histogram, *, about: str) -> str:
    """A small histogram: values as an area, stored codes as bars, levels as lines."""
    width = chart.high - chart.low
    total = sum(chart.counts) or 1
    density = [count / total * len(chart.counts) for count in chart.counts]
    codes = _binned(chart.codes, len(chart.counts)) if len(chart.codes) > len(chart.counts) else chart.codes
    stored = sum(codes) or 1
    bars = [count / stored * len(codes) for count in codes]
    most = max([*density, *bars], default=1) or 1

    def height(value: float) -> float:
        share = value / most
        return math.sqrt(share) if chart.rare else share

    body = []
    if len(chart.levels) <= FEW_LEVELS:
        marks = [(level - chart.low) / width for level in chart.levels]
        body += [_line(x, 0, x, 1, "level") for x in marks]
    elif chart.levels:
        ends = [(level - chart.low) / width for level in (chart.levels[0], chart.levels[-1])]
        body.append(
            f'<rect class="range" x="{_x(ends[0])}" y="0" width="{_x(ends[1] - ends[0])}" height="{SIZE}"/>'
        )
    each = SIZE / max(len(bars), 1)
    for k, bar in enumerate(bars):
        if bar:
            h = height(bar) * SIZE
            body.append(
                f'<rect class="code" x="{(k + 0.2) * each:.1f}" y="{SIZE - h:.1f}" width="{0.6 * each:.1f}" '
                f'height="{h:.1f}"/>'
            )
    path = [f"0,{SIZE}"]
    for k, value in enumerate(density):
        y = _y(height(value))
        path += [f"{k / len(density) * SIZE:.1f},{y}", f"{(k + 1) / len(density) * SIZE:.1f},{y}"]
    body.append(f'<polygon class="values" points="{" ".join(path)} {SIZE},{SIZE}"/>')
    return _figure("histogram", about, body, [])


def dot_rows(rows: Sequence[Row], *, labels: Sequence[str], unit: str, zero: bool = True) -> str:
    """One line a row with its values on a common scale; `zero` makes it include 0."""
    values = [v for row in rows for _, v in row.dots if v is not None]
    if not values:
        return ""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if not high > low:
        high = low + 1
    room = 0.03 * (high - low)
    low, high = low - (room if low < 0 or not zero else 0), high + room

    def left(value: float) -> str:
        return _percent((value - low) / (high - low))

    marks = ticks(low, high, 4)
    grid = "".join(
        f'<i class="{"zero" if mark == 0 else "mark"}" style="left:{left(mark)}"></i>' for mark in marks
    )
    scale = "".join(f'<span style="left:{left(mark)}">{number(mark)}</span>' for mark in marks)
    lines = []
    for row in rows:
        dots = [(series, value) for series, value in row.dots if value is not None]
        bar = ""
        if row.joined and len(dots) > 1:
            a, b = sorted(value for _, value in dots[:2])
            bar = f'<i class="join" style="left:{left(a)};width:{_percent((b - a) / (high - low))}"></i>'
        drawn = "".join(
            f'<i class="dot s{series}" style="left:{left(value)}" '
            f'title="{escape(labels[series])}: {number(value)} {escape(unit)}"></i>'
            for series, value in dots
        )
        lines.append(
            f'<div class="row"><span class="name">{escape(row.label)}</span>'
            f'<span class="track">{grid}{bar}{drawn}</span>'
            f'<span class="value">{escape(row.text)}</span></div>'
        )
    foot = '<div class="row scale"><span class="name"></span>'
    foot += f'<span class="track">{scale}</span><span></span></div>'
    return f'<div class="rows">{"".join(lines)}{foot}</div>' + legend(labels, note=unit)


def share_bar(parts: Sequence[tuple[str, float, str]]) -> str:
    """A stacked bar of (label, size, text), with what each part is below it."""
    total = sum(size for _, size, _ in parts) or 1
    pieces = "".join(
        f'<i class="fill s{k % 6}" style="width:{_percent(size / total)}" '
        f'title="{escape(label)}: {escape(text)}"></i>'
        for k, (label, size, text) in enumerate(parts)
    )
    keys = "".join(
        f'<span class="key s{k % 6}">{escape(label)} <b>{escape(text)}</b></span>'
        for k, (label, _, text) in enumerate(parts)
    )
    return f'<div class="stack">{pieces}</div><p class="legend">{keys}</p>'


def legend(labels: Sequence[str], *, note: str = "") -> str:
    """What the colours stand for."""
    keys = "".join(f'<span class="key s{k}">{escape(label)}</span>' for k, label in enumerate(labels))
    return f'<p class="legend">{keys}{f"<span>{escape(note)}</span>" if note else ""}</p>'


def number(value: float) -> str:
    """Three significant digits without an exponent where that is short."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    else:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return text.replace("-", "−")


def _figure(kind: str, about: str, body: Sequence[str], labels: Sequence[str]) -> str:
    return (
        f'<div class="plot {kind}" role="img" aria-label="{escape(about)}">'
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(body)}</svg>{''.join(labels)}</div>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{_x(x1)}" y1="{_y(y1)}" x2="{_x(x2)}" y2="{_y(y2)}"/>'


def _x(share: float) -> str:
    return f"{share * SIZE:.1f}"


def _y(share: float) -> str:
    return f"{(1 - share) * SIZE:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _binned(counts: Sequence[float], bins: int) -> list[float]:
    each = len(counts) / bins
    found = [0.0] * bins
    for k, count in enumerate(counts):
        found[min(int(k / each), bins - 1)] += count
    return found
