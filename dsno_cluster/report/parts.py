"""Building blocks of the report: tables, charts with their figures, pictures with labels, notes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from dsno_cluster.evaluation.records import Layout, Metrics
from dsno_cluster.evaluation.table import Figure, table_rows
from dsno_cluster.report import charts
from dsno_cluster.report.markup import Markup, tag, together
from dsno_cluster.report.run_charts import chart_table

_ARROWS = {
    "lower": ("↓", "lower is better"),
    "higher": ("↑", "higher is better"),
    "as real": ("≈", "best as held-out real images have it"),
}


def missing(what: str, command: str | None = None) -> Markup:
    """A line on what is missing, with the command that makes it."""
    return tag("p", what, together(": ", tag("code", command)) if command else ".", class_="missing")


def note(title: str, lines: Sequence[str]) -> Markup:
    return tag(
        "div",
        tag("strong", title),
        tag("ul", *(tag("li", line) for line in lines)),
        class_="note",
        role="note",
    )


def facts(caption: str, rows: Sequence[tuple[str, str]]) -> Markup:
    """A table of two columns: names and values."""
    lines = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in rows]
    return tag("table", tag("caption", tag("span", caption)), tag("tbody", *lines), class_="facts")


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], ours: int | None = None
) -> Markup:
    """A table of figures; its first column names the rows, `ours` is the row to highlight."""
    head = tag("tr", *(tag("th", title, scope="col") for title in header))
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell) for cell in row[1:]),
            class_="ours" if i == ours else None,
        )
        for i, row in enumerate(rows)
    ]
    whole = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", head),
        tag("tbody", *body),
        class_="figures",
    )
    # a table that is wider than the page scrolls in itself, and from the keyboard
    return tag("div", whole, class_="scroll", role="region", aria_label=caption, tabindex="0")


def headline_table(caption: str, metrics: Metrics, figures: Sequence[Figure]) -> Markup:
    header, rows = table_rows(metrics)
    titles: list[str] = list(header[: len(header) - len(figures)])
    for figure in figures:
        arrow, words = _ARROWS[figure.better]
        titles.append(
            together(
                figure.title,
                "\u00a0",
                tag("span", arrow, aria_hidden="true"),
                tag("span", f" ({words})", class_="hidden"),
            )
        )
    return table(caption, titles, rows, ours=len(rows) - 1)


def chart_figure(chart: charts.Chart) -> Markup:
    """A chart, a sentence on what it shows, and its figures as a table that opens."""
    figures = tag("details", tag("summary", "The figures"), table(chart.title, *chart_table(chart)))
    return tag(
        "figure", tag("figcaption", tag("strong", chart.title), chart.summary), charts.draw(chart), figures
    )


def captioned(title: str, said: str, picture: str, alt: str) -> Markup:
    """A picture that has its own labels, with a title and a sentence on what it shows."""
    image = tag("img", src=picture, alt=alt, class_="whole")
    return tag("figure", tag("figcaption", tag("strong", title), said), image)


@dataclass(frozen=True)
class Side:
    """One of two compared pictures: who drew its samples, at how many evaluations each, and its data URI."""

    who: str
    evaluations: int
    picture: str


def comparison(layout: Layout, theirs: Side, ours: Side) -> Markup:
    """Two grids of the same noise under one slider; side by side without scripts, and on paper."""
    width = layout.columns * (layout.tile + layout.gap) + layout.gap
    step = layout.height + layout.gap
    height = layout.rows * step + layout.gap
    middles = [layout.gap + layout.height / 2 + r * step for r in range(layout.rows)]
    names = [tag("span", str(r), class_="row", style=f"top:{y / height:.2%}") for r, y in enumerate(middles)]
    classes = f"one row for each of {layout.rows} classes" if layout.classes else f"{layout.rows} rows"

    def side(class_: str, drawn: Side) -> Markup:
        alt = f"Samples of the {drawn.who}, {classes}, {layout.columns} in a row"
        image = _image(drawn.picture, alt, width, height, layout.tile)
        caption = f"{drawn.who}, {drawn.evaluations} evaluation{'s' if drawn.evaluations > 1 else ''}"
        labels = names if layout.classes else []
        return tag(
            "figure",
            tag("div", image, *labels, class_="plate rows"),
            tag("figcaption", caption),
            class_=class_,
        )

    slider = tag(
        "input",
        type="range",
        min=0,
        max=100,
        value=50,
        step=1,
        aria_label=f"Border between {theirs.who} and {ours.who}",
    )
    return tag(
        "div",
        tag("div", side("theirs-side", theirs), side("ours-side", ours), class_="sides"),
        tag(
            "div",
            slider,
            tag("span", theirs.who, class_="theirs"),
            tag("span", ours.who, class_="ours"),
            class_="control",
        ),
        class_="compare",
        style=f"--w:{width * max(1, round(64 / layout.tile))}px",
    )


def strips(layout: Layout, picture: str) -> Markup:
    """Samples through time, teacher over student, with the times above and the names beside them."""
    tile, gap, times = layout.tile, layout.gap, layout.times
    step, step_down, pairs = tile + gap, layout.height + gap, len(layout.strips)
    width = len(times) * step + gap
    height = 2 * pairs * step_down + (pairs - 1) * layout.pair_gap + gap
    labels = []
    for row in range(2 * pairs):
        y = gap + layout.height / 2 + row * step_down + row // 2 * layout.pair_gap
        who, class_ = (("teacher", "theirs"), ("student", "ours"))[row % 2]
        labels.append(tag("span", who, class_=f"row {class_}", style=f"top:{y / height:.2%}"))
    every = -(-len(times) // 6)  # so that they do not overlap
    for column in [*range(0, len(times) - every, every), len(times) - 1]:
        x = gap + tile / 2 + column * step
        said = f"{times[column]:.4g}" if column else f"t = {times[column]:.4g}"
        labels.append(tag("span", said, class_="column", style=f"left:{x / width:.2%}"))
    alt = f"{pairs} samples from noise to image at {len(times)} times, each as a row of the teacher over one of the student"
    return tag(
        "div",
        tag(
            "figure",
            tag("div", _image(picture, alt, width, height, tile), *labels, class_="plate rows columns"),
        ),
        class_="strips",
        style=f"--w:{width * max(1, round(64 / tile))}px",
    )


def _image(picture: str, alt: str, width: int, height: int, tile: int) -> Markup:
    pixels = "pixels" if tile < 48 else None  # enlarged: its own pixels stay sharp
    return tag("img", src=picture, alt=alt, width=width, height=height, class_=pixels, draggable="false")


def download(file_name: str, text: str) -> Markup:
    """A link that saves `text`, which is embedded in the page."""
    data = "data:text/yaml;base64," + base64.b64encode(text.encode()).decode()
    return tag("p", tag("a", f"Save {file_name}", download=file_name, href=data))
