"""What people see: rich progress on a terminal, plain lines in a log, tables.

Everything goes to standard error except results that a command was asked for, so that `--json` output stays
clean.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from dsno_cluster.errors import without_passwords
from dsno_cluster.files import replace_file
from dsno_cluster.records import Record, record_bytes


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line deal with it, as with that of a plain print."""
        raise


_console = _Console(stderr=True, highlight=False, soft_wrap=True)
_LOG_EVERY_SECONDS = 10.0
_WRAPPED = 24  # columns that a cell of many words needs at least
_LOG_WIDTH = 200  # a file or a pipe has no width of its own
_RECORD_EVERY_SECONDS = 2.0
_record_file: Path | None = None


def say(message: str) -> None:
    """One line of what is going on, or is about to."""
    _console.print(without_passwords(message), markup=False)


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def error(message: str) -> None:
    """One line that says what went wrong and what to do."""
    _console.print(
        f"dsno-cluster: {without_passwords(' '.join(message.split()))}",
        markup=False,
        style="bold red" if _console.is_terminal else None,
    )


@contextlib.contextmanager
def progress(
    title: str, total: int, unit: str, *, done: int = 0, reached: int | None = None, quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Progress of long work; yields `advance(count, **figures)`.

    On a terminal a bar; elsewhere a plain line at most every ten seconds. `figures` are shown at the end of
    the line. `done` is what a former run had done: it does not count in the rate. `reached` (default: `done`) says how far
    former runs had come where `total` is of this one alone; it is recorded, not shown. `quiet` shows nothing, for all ranks
    but one.
    """
    if quiet:
        yield lambda count, **figures: None
        return
    shown = (_bar if _console.is_terminal else _lines)(title, total, unit, done)
    with shown as advance:
        if _record_file is None:
            yield advance
            return
        reached = done if reached is None else reached
        begun = ProgressRecord(title=title, unit=unit, start=done, reached=reached, total=total, done=done)
        yield _recorded(advance, _record_file, begun)


class ProgressRecord(Record):
    """How far work has come, for those who watch it from another process: `rate` a second, `time` of writing."""

    schema_version: Literal[1] = 1
    title: str
    unit: str
    start: int  # what former runs had done of `total`
    reached: int  # what former runs had done in all
    total: int
    done: int
    rate: float = 0.0
    time: float = 0.0
    figures: str = ""


def record_progress(file: Path) -> None:
    """From now on this process also keeps its progress in `file`, as a `ProgressRecord`."""
    global _record_file
    _record_file = file


def _recorded(advance: Callable[..., None], file: Path, begun: ProgressRecord) -> Callable[..., None]:
    began, written, done = time.time(), 0.0, begun.start

    def record(figures: Mapping[str, object]) -> None:
        nonlocal written
        written = time.time()
        rate = (done - begun.start) / max(written - began, 1e-9)
        now = {"done": done, "rate": rate, "time": written, "figures": _figures(figures)}
        with contextlib.suppress(OSError):  # a full disk: what matters there is told by those who need it
            replace_file(file, record_bytes(begun.model_copy(update=now)))

    def advance_and_record(count: int, **figures: Any) -> None:
        nonlocal done
        advance(count, **figures)
        done += count
        if time.time() - written >= _RECORD_EVERY_SECONDS or done >= begun.total:
            record(figures)

    record({})
    return advance_and_record


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
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, to_stdout: bool = True
) -> None:
    """A table of results. Its first column, which names the rows, stays whole.

    Where the terminal is too narrow for it, a list: each row's name, and below it what is known of it.
    """
    wide = None if sys.stdout.isatty() else _LOG_WIDTH
    console = _Console(file=sys.stdout, width=wide, highlight=False) if to_stdout else _console
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    # words of the last column may be wrapped
    needed = sum(widths[:-1]) + min(widths[-1], _WRAPPED) + 3 * len(widths) + 1
    if needed > console.width:
        for row in rows:
            named = [f"    {name}: {cell}" for name, cell in list(zip(header, row, strict=True))[1:]]
            known = [line for line, cell in zip(named, row[1:], strict=True) if cell not in ("", "-")]
            console.print("\n".join([row[0], *known]), markup=False, soft_wrap=True)
        return
    drawn = Table(Column(header[0], no_wrap=True), *header[1:])
    for row in rows:
        drawn.add_row(*row)
    console.print(title, markup=False, soft_wrap=True)  # of a table rich would wrap it
    console.print(drawn)
