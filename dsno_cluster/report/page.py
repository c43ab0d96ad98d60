"""The report of a run: one self-contained HTML file, made only from the run's files."""

from __future__ import annotations

import time
from importlib import resources

from dsno_cluster import __version__
from dsno_cluster.config import Config
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.records import Figures, Layout, Metrics, TeacherRow
from dsno_cluster.evaluation.table import all_rows, conditions, figures_of, spread_notes
from dsno_cluster.report import parts
from dsno_cluster.report.markup import Markup, tag, together
from dsno_cluster.report.parts import Side
from dsno_cluster.report.progress import RELOAD_SECONDS, Progress, progress_section
from dsno_cluster.report.run_charts import (
    cost_chart,
    distance_chart,
    heldout_chart,
    history_chart,
    history_figures,
    loss_chart,
    number_3,
)
from dsno_cluster.report.run_files import RunFiles, read_run_files
from dsno_cluster.report.text import (
    cost_of,
    differences,
    introduction,
    reproduction,
    settings_of,
    versions_of,
    warnings_of,
)
from dsno_cluster.storage import write_file

PAPER = "https://arxiv.org/abs/2211.13449"
# the file loads nothing, whatever its contents
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(config: Config, config_words: str, out: str | None = None) -> str:
    """Write the report of a run to `out` (default: `<run_dir>/report-<name>.html`); returns its path.

    If the config's `finish` is enabled, it shows the finished student once there is anything of it. `config_words`
    name the config in the commands that the report shows. Raises UserError if there is nothing to report yet or a
    file is damaged, WorkError if storage or disk fail.
    """
    files, path = read_run_files(config), report_path(config, out)
    if files.is_empty:
        raise UserError(
            f"{config.name}: nothing to report yet, neither {files.places['curve']} nor {files.places['metrics']} exists; "
            "`dsno-cluster train` and `dsno-cluster eval` make them"
        )
    write_page(path, files, config_words)
    return path


def report_path(config: Config, out: str | None) -> str:
    """`out`, or where a report is written by default."""
    return out or str(config.run_dir / f"report-{config.name}.html")


def write_page(path: str, files: RunFiles, config_words: str, progress: Progress | None = None) -> None:
    """Write the report of these files. Raises WorkError if storage or disk fail."""
    text = page(files, config_words, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), progress)
    write_file(path, text.encode(), files.config.storage.endpoint_url)


def page(files: RunFiles, config_words: str, written: str, progress: Progress | None = None) -> str:
    """The report as HTML. `written` is its date, `progress` that of the stages if the run is followed."""
    name, live = files.config.name, progress is not None and progress.live
    sections = [
        *([("progress", "Progress", progress_section(progress))] if progress is not None else []),
        ("figures", "Student and teacher", _figures(files, config_words)),
        ("samples", "Samples of the same noise", _samples(files, config_words)),
        ("trajectories", "Trajectories", _trajectories(files, config_words)),
        ("training", "Training", _training(files, config_words)),
        ("history", "Quality against step", _history(files, config_words)),
        ("cost", "Cost", parts.facts("What this run cost", cost_of(files))),
        ("settings", "Settings", _settings(files)),
        ("versions", "Versions", parts.table("Software and devices, by stage", *versions_of(files))),
        ("reproduce", "How to reproduce it", _reproduce(files)),
    ]
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("noscript", tag("meta", http_equiv="refresh", content=RELOAD_SECONDS)) if live else None,
        tag("title", f"{name}: DSNO report"),
        tag("style", _asset("page.css")),
    )
    footer = tag(
        "p",
        f"Written {written} by dsno-cluster {__version__}. The method: ",
        tag(
            "a",
            "Zheng et al., Fast Sampling of Diffusion Models via Operator Learning, ICML 2023",
            href=PAPER,
        ),
        ".",
        class_="muted",
    )
    body = tag(
        "body",
        tag("a", "Skip to the figures", class_="skip", href="#figures"),
        tag(
            "header",
            tag("p", "dsno-cluster report", class_="eyebrow"),
            tag("h1", name),
            tag("p", introduction(files)),
            _tiles(files),
            tag("nav", tag("ul", *links), aria_label="Sections"),
        ),
        tag(
            "main",
            *(
                tag(
                    "section",
                    tag("h2", title, id=f"{key}-title"),
                    content,
                    id=key,
                    aria_labelledby=f"{key}-title",
                )
                for key, title, content in sections
            ),
        ),
        tag("footer", footer),
        tag("script", _asset("page.js")),
        tag("script", _asset("live.js")) if progress is not None else None,
        data_reload=RELOAD_SECONDS if live else None,
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _asset(name: str) -> Markup:
    return Markup((resources.files("dsno_cluster.report") / name).read_text())


def _tiles(files: RunFiles) -> Markup | None:
    """The table's first figure, for the student and for what it is compared with."""
    metrics = files.metrics
    figures = figures_of(metrics) if metrics else []
    if not metrics or not figures:
        return None
    figure, student = figures[0], metrics.student
    cost = student.cost_in_teacher_evaluations
    at_cost = "cost not measured" if cost is None else f"cost {cost:.1f}"
    shown: list[tuple[str, Figures, str]] = [("Student, 1 evaluation", student, at_cost)]
    if metrics.before is not None:
        shown.append(("Student before finishing", metrics.before, f"student {metrics.before.name}"))
    rows = [row for row in metrics.teacher_rows if figure.text(row)]
    affordable = [row for row in rows if cost is not None and row.evaluations <= max(1, round(cost))]
    if affordable:
        rival = affordable[-1]
        shown.append(("Teacher at about that cost", rival, _evaluations(rival)))
    made = next((row for row in rows if row.as_trajectories), None)
    if made is not None:
        shown.append(("Teacher, as in the trajectories", made, _evaluations(made)))
    held_out = metrics.real_held_out
    if held_out:
        shown.append(("Real images, held out", held_out, f"{held_out.num_samples:,} of them"))
    tiles = [
        tag(
            "div",
            tag("dt", title),
            tag("dd", figure.text(row) or "-", tag("small", f"{figure.title}, {how}")),
            class_="ours" if row is student else None,
        )
        for title, row, how in shown
    ]
    return tag("dl", *tiles, class_="tiles")


def _evaluations(row: TeacherRow) -> str:
    count = row.evaluations
    return f"{row.source.removeprefix('teacher, ')}, {count} evaluation{'s' if count > 1 else ''}"


def _figures(files: RunFiles, words: str) -> Markup:
    warnings = [*warnings_of(files), *differences(files)]
    note = parts.note("To keep in mind", warnings) if warnings else None
    metrics = files.metrics
    if metrics is None:
        return together(note, parts.missing("Not evaluated yet", _command(files, "eval", words)))
    figures = figures_of(metrics)
    held_out, reference = metrics.real_held_out, metrics.reference
    few = held_out is not None and held_out.num_samples < metrics.num_samples
    real = f"{reference.count:,} real images" if reference.count else "the real images' statistics"
    if reference.resolution:
        real += f" at {reference.resolution} pixels"
    caption = f"{metrics.num_samples:,} samples each, against {real}; extractor {conditions(metrics)}"
    if not figures:  # only the trajectory error, for which no images are compared
        caption = (
            "No images were compared: evaluation.metrics names only the trajectory error, which is below"
        )
    chart = cost_chart(metrics, figures[0]) if figures else None
    return together(
        note,
        parts.headline_table(caption, metrics, figures),
        tag(
            "p",
            "NFE: network evaluations for one image, one after the other. Cost: the same in evaluations of the teacher, measured "
            "here; a student that answers several times at once may cost more than one. An arrow says which way is better."
            + (" The held-out real images are few, which makes their distances large." if few else "")
            + "".join(f" {line}" for line in spread_notes(figures, all_rows(metrics))),
            class_="muted",
        ),
        parts.chart_figure(chart) if chart else None,
    )


def _samples(files: RunFiles, words: str) -> Markup:
    layout = files.layout
    if not layout or not {"teacher.png", "student.png"} <= files.pictures.keys():
        return parts.missing("No pictures yet", _command(files, "eval", words))
    return together(
        tag(
            "p",
            "Teacher and student begin with the same noise, so each pair should show the same image. Drag the picture or use the "
            "slider; from the keyboard its arrow keys, Home and End."
            + (f" The states{_of_states(layout)}" if layout.states != "images" else ""),
        ),
        parts.comparison(
            layout,
            Side("teacher", files.size.evaluations_per_sample, files.pictures["teacher.png"]),
            Side("student", 1, files.pictures["student.png"]),
        ),
        _before_and_after(files, layout),
        _nearest(files),
    )


def _before_and_after(files: RunFiles, layout: Layout) -> Markup | None:
    """The student before and after finishing, if the former's samples are there."""
    if files.metrics is None or files.metrics.before is None or files.picture_before is None:
        return None
    before = files.metrics.before
    return together(
        tag("p", f"The student before finishing, {before.name}, and after it, from the same noise."),
        parts.comparison(
            layout,
            Side(before.source, 1, files.picture_before),
            Side("student", 1, files.pictures["student.png"]),
        ),
    )


def _nearest(files: RunFiles) -> Markup | None:
    """Samples beside their nearest training images, if that was measured."""
    picture = files.pictures.get("nearest.png")
    if picture is None:
        return None
    said = (
        "Each sample of the student has its nearest training image on its right, by the features of the extractor. A sample that "
        "is a copy shows the same image twice."
    )
    alt = "Samples of the student, each with its nearest training image beside it"
    return parts.captioned("Nearest training images", said, picture, alt)


def _trajectories(files: RunFiles, words: str) -> Markup:
    layout = files.layout
    strips = None
    if layout and "strips.png" in files.pictures:
        strips = together(
            tag(
                "p",
                "From noise (t = 1) to image (t = 0): the teacher's states over the student's"
                + _of_states(layout),
            ),
            parts.strips(layout, files.pictures["strips.png"]),
        )
    table = _errors(files.metrics) if files.metrics else None
    chart = heldout_chart(files.curve, files.config.trajectories.time_points)
    if chart is not None:
        held_out = parts.chart_figure(chart)
    elif files.curve:
        held_out = parts.missing(
            "No held-out errors: training.heldout_every is null, or its first step was not reached"
        )
    else:
        held_out = parts.missing(
            "No held-out errors: there is no training curve", _command(files, "train", words)
        )
    missing = None if strips else parts.missing("No pictures yet", _command(files, "eval", words))
    return together(strips, missing, table, held_out)


def _command(files: RunFiles, stage: str, words: str) -> str:
    """The command that makes what is missing of a stage; `run` comes to the finished student, and skips what is done."""
    return f"dsno-cluster {'run' if files.first else stage} {words}"


def _errors(metrics: Metrics) -> Markup | None:
    errors = metrics.student.trajectory_error
    if not errors:
        return None
    before = metrics.before.trajectory_error if metrics.before else None
    rows = [["relative error", *(number_3(error) for error in errors.values())]]
    if before:
        of_before = (number_3(before[t]) if t in before else "" for t in errors)
        rows.insert(0, ["before finishing", *of_before])
    return parts.table(
        "Relative error of the evaluated student against the teacher's trajectories, on held-out noise",
        ["time", *(f"t\u00a0=\u00a0{float(t):.4g}" for t in errors)],
        rows,
    )


def _of_states(layout: Layout) -> str:
    """How the states in a picture are shown; it ends a sentence."""
    if layout.states == "decoded":
        return ", which are latents: each is decoded, the noise too."
    if layout.states == "latents":
        return (
            f", which are latents of {layout.channels} channels and not decoded: the first three as colours."
        )
    return ", noise at half contrast."


def _training(files: RunFiles, words: str) -> Markup:
    first, extractor = files.first, files.config.evaluation.feature_extractor
    before = None if first is None else loss_chart(first.curve, "Training loss before finishing")
    charts = [before, loss_chart(files.curve), distance_chart(files.curve, extractor)]
    shown = [parts.chart_figure(chart) for chart in charts if chart is not None]
    if files.curve:
        return together(*shown)
    where = f"No training curve at {files.places['curve']}"
    return together(*shown, parts.missing(where, _command(files, "train", words)))


def _history(files: RunFiles, words: str) -> Markup:
    command = None if files.first else f"dsno-cluster eval {words} --watch"
    missing = parts.missing("Checkpoints were not evaluated one by one", command)
    history, metrics = files.history, files.metrics
    if history is None:
        return missing
    extractor = metrics.feature_extractor.name if metrics else files.config.evaluation.feature_extractor
    drawn = []
    for figure in history_figures(history, extractor):
        made = [row for row in metrics.teacher_rows if row.as_trajectories] if metrics else []
        values = [(f"teacher, {row.evaluations} NFE", row.figure(figure.key)) for row in made]
        level = next(((name, value) for name, value in values if value is not None), None)
        chart = history_chart(history, figure, level)
        drawn += [parts.chart_figure(chart)] if chart is not None else []
    return together(*drawn) if drawn else missing


def _settings(files: RunFiles) -> Markup:
    spec, *others = (parts.facts(title, rows) for title, rows in settings_of(files))
    return together(spec, tag("details", tag("summary", "Student, training and evaluation"), *others))


def _reproduce(files: RunFiles) -> Markup:
    commands, config_text, file_name = reproduction(files)
    return together(
        tag(
            "p",
            "Save the config below as ",
            tag("code", file_name),
            " and run, with the versions above. Equal spec, device model and versions give the same trajectories, byte for byte.",
        ),
        tag("pre", tag("code", commands), tabindex="0", aria_label="Commands"),
        parts.download(file_name, config_text),
        tag(
            "details",
            tag("summary", f"The whole config, {file_name}"),
            tag("pre", tag("code", config_text), tabindex="0"),
        ),
    )
