"""Output for people: progress bars on a terminal, plain lines in a log, tables.

Everything is printed to standard error, except the results that a command was asked for, so `--json` output
stays clean.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from dsno_cluster import liveness
from dsno_cluster.errors import without_passwords


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, as after a plain print."""
        raise


_console = _Console(stderr=True, highlight=False, soft_wrap=True)
_LOG_EVERY_SECONDS = 10.0
_WRAPPED = 24  # smallest width of a column that may wrap
_MOST_PARTS = 3  # tables into which one is divided
_LOG_WIDTH = 200  # a file or a pipe has no width of its own
_RECORD_EVERY_SECONDS = 2.0
_recorders: list[Callable[[Tally], None]] = []
_remark = ""

# a measured number, or one for each time point
Figure = float | Sequence[float]


@dataclass(frozen=True)
class Tally:
    """The progress of long work.

    `start`: units done by an earlier run; `reached`: how far earlier runs came (see `progress`); `rate`:
    units per second. `figures`: those that the progress line shows; `recorded`: the newest of each that was only
    recorded, by name. `remark`: what `status` says beside it.
    """

    title: str
    unit: str
    start: int
    reached: int
    total: int
    done: int
    rate: float = 0.0
    figures: str = ""
    remark: str = ""
    recorded: Mapping[str, Figure] = field(default_factory=dict)


def say(message: str) -> None:
    """Print one line about what is happening or about to happen."""
    _print(without_passwords(message))


def _print(message: str, style: str | None = None) -> None:
    """Print a line, unless the disk of the log is full: nobody's work ends for that."""
    try:
        _console.print(message, markup=False, style=style)
    except BrokenPipeError:
        raise
    except OSError:
        atexit.unregister(_drop_unprinted)
        atexit.register(_drop_unprinted)


def _drop_unprinted() -> None:
    """At exit, drop what still cannot be printed: Python would change the exit status to 120."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def remark(message: str) -> None:
    """Print one line, which `status` then shows beside this process's progress; empty: it shows none any more."""
    global _remark
    _remark = message
    if message:
        say(message)


def duration(seconds: float) -> str:
    """A duration as text, such as 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def error(message: str) -> None:
    """Print one line that says what went wrong and what to do."""
    _print(
        f"dsno-cluster: {without_passwords(' '.join(message.split()))}",
        "bold red" if _console.is_terminal else None,
    )


@contextlib.contextmanager
def progress(
    title: str, total: int, unit: str, *, done: int = 0, reached: int | None = None, quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Show the progress of long work; yields `advance(count, recorded=None, **figures)`.

    On a terminal this is a bar, elsewhere a plain line at most every ten seconds. `figures` appear at the end
    of the line; `recorded`, a mapping of names to figures, is not shown, but passed on to whoever records.
    `done` units were done by an earlier run and do not count towards the rate. `reached` (default: `done`)
    says how far earlier runs came if `total` is only that of this run; it is recorded, not shown. `quiet`
    shows nothing, for all ranks except one.
    """
    if quiet:
        yield lambda count, recorded=None, **figures: liveness.progressed()
        return
    shown = (_bar if _console.is_terminal else _lines)(title, total, unit, done)
    with shown as show:
        begun = Tally(title, unit, done, done if reached is None else reached, total, done)
        record = _recorded(tuple(_recorders), begun)

        def advance(count: int, recorded: Mapping[str, Figure] | None = None, **figures: Any) -> None:
            liveness.progressed()
            show(count, **figures)
            record(count, recorded or {}, figures)

        yield advance


@contextlib.contextmanager
def recording(record: Callable[[Tally], None]) -> Iterator[None]:
    """In this context, work that begins also passes its progress in this process to `record`, every two seconds."""
    _recorders.append(record)
    try:
        yield
    finally:
        _recorders.remove(record)


def _recorded(
    recorders: Sequence[Callable[[Tally], None]], tally: Tally
) -> Callable[[int, Mapping[str, Figure], Mapping[str, object]], None]:
    began, written = time.monotonic(), float("-inf")

    def write(figures: Mapping[str, object]) -> None:
        nonlocal written, tally
        written = time.monotonic()
        rate = (tally.done - tally.start) / max(written - began, 1e-9)
        tally = replace(tally, rate=rate, figures=_figures(figures), remark=_remark)
        for record in recorders:
            with contextlib.suppress(OSError):  # a full disk is reported by the work itself
                record(tally)

    def advance(count: int, recorded: Mapping[str, Figure], figures: Mapping[str, object]) -> None:
        nonlocal tally
        tally = replace(tally, done=tally.done + count, recorded={**tally.recorded, **recorded})
        if time.monotonic() - written >= _RECORD_EVERY_SECONDS or tally.done >= tally.total:
            write(figures)

    write({})
    return advance


@contextlib.contextmanager
def _bar(title: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=_console) as bar:
        task = bar.add_task(title, total=total, completed=done, figures="")

        def advance(count: int, **figures: Any) -> None:
            bar.update(task, advance=count, figures=_figures(figures))

        yield advance


@contextlib.contextmanager
def _lines(title: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
    began = last = time.monotonic()
    before = done

    def advance(count: int, **figures: Any) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _LOG_EVERY_SECONDS or (done >= total and count):
            last = now
            rate = (done - before) / max(now - began, 1e-9)
            left = f", {duration((total - done) / rate)} left" if rate > 0 and done < total else ""
            say(", ".join(filter(None, [f"{title}: {done}/{total} {unit}{left}", _figures(figures)])))

    yield advance


def _figures(figures: Mapping[str, object]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())


def table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    to_stdout: bool = True,
    divided: bool = True,
) -> None:
    """Print a table of results. Its first column, which names the rows, is never wrapped.

    On a narrow terminal the titles are wrapped, and columns that still have no room follow in further tables, each with the
    rows' names. If these were many, if not even one column has room beside the names, or if the table is not to be `divided`
    (its columns are not figures to compare, but what is known of each row), print a list: each name, and below it the known
    values.
    """
    wide = None if sys.stdout.isatty() else _LOG_WIDTH
    console = _Console(file=sys.stdout, width=wide, highlight=False) if to_stdout else _console
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    # words of the last column may be wrapped
    if sum(widths[:-1]) + min(widths[-1], _WRAPPED) + 3 * len(widths) + 1 <= console.width:
        console.print(title, markup=False, soft_wrap=True)  # as the table's title, rich would wrap it
        console.print(_drawn(columns))
        return
    parts = _parts(columns, console.width) if divided else None
    if parts is None or len(parts) > _MOST_PARTS:
        for row in rows:
            named = [f"    {name}: {cell}" for name, cell in list(zip(header, row, strict=True))[1:]]
            known = [line for line, cell in zip(named, row[1:], strict=True) if cell not in ("", "-")]
            console.print("\n".join([row[0], *known]), markup=False, soft_wrap=True)
        return
    console.print(title, markup=False, soft_wrap=True)
    for part in parts:
        console.print(_drawn(part))


def _drawn(columns: Sequence[Sequence[str]]) -> Table:
    """A table of columns, each with its title first."""
    drawn = Table(*(Column(column[0], no_wrap=number == 0) for number, column in enumerate(columns)))
    for row in list(zip(*columns, strict=True))[1:]:
        drawn.add_row(*row)
    return drawn


def _parts(columns: Sequence[Sequence[str]], width: int) -> list[list[Sequence[str]]] | None:
    """The columns with wrapped titles, in tables of that width that each begin with the first; None if one is too wide."""
    names, *others = [_with_wrapped_title(column) for column in columns]
    room = width - 1 - _drawn_width(names)
    if any(_drawn_width(column) > room for column in others):
        return None
    parts: list[list[Sequence[str]]] = [[names]]
    left = room
    for column in others:
        if _drawn_width(column) > left:
            parts.append([names])
            left = room
        parts[-1].append(column)
        left -= _drawn_width(column)
    return parts


def _with_wrapped_title(column: Sequence[str]) -> list[str]:
    title, *cells = column
    width = max(map(len, [*title.split(), *cells]))
    return ["\n".join(textwrap.wrap(title, width)), *cells]


def _drawn_width(column: Sequence[str]) -> int:
    """Of a column with a wrapped title, with the line on its left and a space on either side."""
    return max(len(line) for cell in column for line in cell.split("\n")) + 3
