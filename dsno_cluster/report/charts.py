"""Line charts as inline SVG, without a library: axes with units, readable ticks, log scales, direct labels.

A chart is drawn twice, wide and narrow, so that its text keeps its size on a phone; the page's style shows one of them.
Colours are the page's own (classes c0 to c7), for light and dark.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dsno_cluster.report.markup import Markup, tag, together

WIDTHS = {"wide": 760, "narrow": 350}
COLOURS = 8
MOST_POINTS = 400  # of a drawn line; longer ones are averaged
_ABOVE, _BELOW, _LEFT, _LINE = 12, 46, 62, 15  # room around the plot, and between two labels
_LETTER = 7.5  # width of a letter of a label, about


@dataclass(frozen=True)
class Series:
    """A line: its name, its points in order of x, and `colour`, an index into the page's colours.

    `dots`: points only. `loud`: the main subject of the chart, with large points, named beside the last one. `spreads`: by x, how
    far the interval of a point reaches on either side of it.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False
    loud: bool = False
    spreads: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """A chart to draw.

    `levels` are named values of y, drawn across; `summary` says in words what the chart shows.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    summary: str
    levels: Sequence[tuple[str, float]] = ()
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class _Axis:
    """A range of values mapped to pixels from `begin` to `end`."""

    low: float
    high: float
    log: bool
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        low, high, value = (
            map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)


def draw(chart: Chart) -> Markup:
    """The chart in both widths."""
    return together(*(_draw(chart, name, width) for name, width in WIDTHS.items()))


def averaged(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """`points`, or the means of `most` consecutive parts of them."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    parts = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float, log: bool, most: int) -> list[float]:
    """Round values in [low, high], at most `most` of them.

    On a log scale powers of ten and a few between them.
    """
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1, 2, 3, 4, 6, 8), (1, 3), (1,)):
            found = [d * 10.0**e for e in decades for d in digits]
            found = [v for v in found if low * 0.999 <= v <= high * 1.001]
            if 3 <= len(found) <= most:
                return found
        if len(found) > most:
            return found[:: math.ceil(len(found) / most)]
    rough = (high - low) / max(1, most - 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [v for i in range(most + 1) if (v := (first + i) * step) <= high + step * 1e-9]


def number(value: float) -> str:
    """A number short enough for an axis, such as 12,000, 0.05 or 2e-6."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e7:
        return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _draw(chart: Chart, class_: str, width: int) -> Markup:
    height = 300 if class_ == "wide" else 260
    series = [replace(s, points=averaged(s.points)) for s in chart.series if s.points]
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + [y for _, y in chart.levels]
    reached = [end for s in series for _, *interval in _intervals(s) for end in interval]
    ys += [end for end in reached if end > 0 or not chart.log_y]
    if not series:
        return Markup("")
    log_x, log_y = chart.log_x and min(xs) > 0, chart.log_y and min(ys) > 0
    names = [s.name for s in series] + [
        name for name, _ in chart.levels
    ]  # a single series needs no name besides the title
    margin = [s.name for s in series if not s.loud] + [name for name, _ in chart.levels]
    right = 14 + _LETTER * max(map(len, margin), default=0) if names[1:] else 16
    across = _Axis(*_range(xs, log_x, from_zero=not log_x), log_x, _LEFT, width - right)
    up = _Axis(*_range(ys, log_y, from_zero=False), log_y, height - _BELOW, _ABOVE)
    shown = ticks(across.low, across.high, log_x, 8 if class_ == "wide" else 4)
    parts = []
    for value in ticks(up.low, up.high, log_y, 7):
        y = f"{up(value):.1f}"
        parts.append(tag("line", class_="rule", x1=_LEFT, x2=f"{across.end:.1f}", y1=y, y2=y))
        parts.append(
            tag("text", number(value), class_="tick", x=_LEFT - 8, y=y, dy="0.35em", text_anchor="end")
        )
    bottom = height - _BELOW
    for value in shown:
        x = f"{across(value):.1f}"
        parts.append(tag("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 5))
        parts.append(tag("text", number(value), class_="tick", x=x, y=bottom + 18, text_anchor="middle"))
    parts.append(tag("line", class_="axis", x1=_LEFT, x2=f"{across.end:.1f}", y1=bottom, y2=bottom))
    middle = max(
        (_LEFT + across.end) / 2, _LETTER * len(chart.x) / 2
    )  # a long name on a narrow chart begins at its edge
    parts.append(tag("text", chart.x, class_="name", x=f"{middle:.0f}", y=height - 8, text_anchor="middle"))
    turned = f"translate(13 {(bottom + _ABOVE) / 2:.0f}) rotate(-90)"
    parts.append(tag("text", chart.y, class_="name", transform=turned, text_anchor="middle"))
    for _, value in chart.levels:
        y = f"{up(value):.1f}"
        parts.append(tag("line", class_="level", x1=_LEFT, x2=f"{across.end:.1f}", y1=y, y2=y))
    parts += [_line(s, across, up) for s in series]
    if names[1:]:
        quiet = [s for s in series if not s.loud]
        ends = [(s.name, up(s.points[-1][1]), f"label c{s.colour % COLOURS}") for s in quiet]
        ends += [(name, up(value), "label") for name, value in chart.levels]
        parts += _labels(ends, across.end + 8, _ABOVE, bottom)
    said = f"{chart.title}. {chart.summary}"
    return tag(
        "svg", *parts, class_=f"chart {class_}", role="img", aria_label=said, viewBox=f"0 0 {width} {height}"
    )


def _range(values: Sequence[float], log: bool, *, from_zero: bool) -> tuple[float, float]:
    """The range of an axis: the values with some room, or 0 to the largest."""
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.06, 1.12)
        return low / room, high * room
    if from_zero and low >= 0:
        return 0.0, high * 1.02 or 1.0
    room = (high - low) * 0.06 or abs(high) * 0.5 or 1.0
    return low - room, high + room


def _intervals(series: Series) -> list[tuple[float, float, float]]:
    """x, and the lower and upper end of the interval, of each drawn point that has one."""
    return [
        (x, y - series.spreads[x], y + series.spreads[x]) for x, y in series.points if x in series.spreads
    ]


def _line(series: Series, across: _Axis, up: _Axis) -> Markup:
    places = [(f"{across(x):.1f}", f"{up(y):.1f}") for x, y in series.points]
    colour = f"c{series.colour % COLOURS}"
    line = None
    if len(places) > 1 and not series.dots:
        line = tag("polyline", class_=f"line {colour}", points=" ".join(",".join(p) for p in places))
    points = []
    for at, low, high in _intervals(series):
        middle, lowest = f"{across(at):.1f}", low if low > 0 or not up.log else up.low
        ends = {"y1": f"{up(lowest):.1f}", "y2": f"{up(high):.1f}"}
        points.append(tag("line", class_=f"line spread {colour}", x1=middle, x2=middle, **ends))
    if len(places) <= 30 or series.dots:
        radius = 6 if series.loud else 3 if len(places) > 1 else 4
        for (x, y), (value_x, value_y) in zip(places, series.points, strict=True):
            said = tag("title", f"{series.name}: {number(value_y)} at {number(value_x)}")
            points.append(tag("circle", said, class_=f"dot {colour}", cx=x, cy=y, r=radius))
    if series.loud:
        x, y = places[-1]
        fits = float(x) + 10 + _LETTER * len(series.name) <= across.end
        beside, anchor = (float(x) + 10, "start") if fits else (float(x) - 10, "end")
        label = {"class_": f"label {colour}", "x": f"{beside:.1f}", "y": y, "dy": "0.35em"}
        points.append(tag("text", series.name, text_anchor=anchor, **label))
    return together(line, *points)


def _labels(ends: Sequence[tuple[str, float, str]], x: float, top: float, bottom: float) -> list[Markup]:
    """Names beside the ends of their lines, moved apart if they would overlap."""
    ordered = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, y, _ in ordered:
        places.append(max(y, places[-1] + _LINE if places else top))
    limit = bottom
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - _LINE
    return [
        tag("text", name, class_=class_, x=f"{x:.1f}", y=f"{y:.1f}", dy="0.35em")
        for (name, _, class_), y in zip(ordered, places, strict=True)
    ]
