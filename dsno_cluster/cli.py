"""The command line; `commands/` implements the commands.

Heavy libraries are imported inside the functions that need them, so that `--help` answers at once.

`dsno-cluster COMMAND [CONFIG] [key=value ...] [options]`. Exit status: 0 done, 1 the work or its surroundings
failed, 2 the input is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

from dsno_cluster import __version__
from dsno_cluster.commands import (
    evaluation,
    exchange,
    models,
    options,
    pipeline,
    report,
    runs,
    teachers,
    training,
    trajectories,
)
from dsno_cluster.commands.arguments import DEFAULT_CONFIG, Arguments, Unwatched
from dsno_cluster.errors import UserError, WorkError, closest
from dsno_cluster.stages import EVAL, GEN_TRAJECTORIES, TRAIN

# errors of a file system that are no bug of ours, wherever they come up
_OF_THE_DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP),
)
_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*=")


@dataclass(frozen=True)
class Command:
    """A command: a line of help, its positional arguments, an example, its options."""

    run: Callable[[Arguments], None]
    help: str
    usage: str
    example: str
    options: list[Callable[[argparse.ArgumentParser], None]] = field(default_factory=list)


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError, in one line, instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


COMMANDS = {
    GEN_TRAJECTORIES.name: Command(
        trajectories.gen_trajectories,
        "solve the teacher's ODE for many noises: trajectory shards and their manifest",
        "[CONFIG] [key=value ...]",
        "dsno-cluster gen-trajectories configs/digits.yaml trajectories.num_samples=4000 --actors 2",
        [options.launching, options.actors, options.array],
    ),
    "plan": Command(
        trajectories.plan_trajectories,
        "what gen-trajectories will cost: shards, bytes, evaluations; time and accuracy if asked for",
        "[CONFIG] [key=value ...]",
        "dsno-cluster plan configs/digits.yaml --tolerance 1e-3 --nodes 4",
        [options.planning],
    ),
    TRAIN.name: Command(
        training.train_student,
        "train the student on trajectories, with DeepSpeed",
        "[CONFIG] [key=value ...]",
        "dsno-cluster train configs/digits.yaml name=slower training.lr=1e-4 --tasks-per-node 2 --launcher local",
        [options.launching, options.tasks],
    ),
    EVAL.name: Command(
        evaluation.evaluate_student,
        "sample from the student, or take existing images, and measure: distances, table, pictures",
        "[CONFIG, with --watch also RUN] [key=value ...]",
        "dsno-cluster eval configs/digits.yaml evaluation.num_samples=1000 --json",
        [options.launching, options.actors, options.student, options.evaluated, options.json_output],
    ),
    "run": Command(
        pipeline.run_pipeline,
        "all three stages: on Slurm as jobs that wait for each other, here one after the other",
        "[CONFIG] [key=value ...]",
        "dsno-cluster run configs/imagenet64.yaml --nodes 16",
        [options.launching],
    ),
    "report": Command(
        report.write_report,
        "one HTML file of an experiment: figures, curves, pictures, spec, versions, cost, how to reproduce it",
        "[CONFIG or RUN] [key=value ...]",
        "dsno-cluster report configs/digits.yaml --out digits.html",
        [options.reporting],
    ),
    "status": Command(
        runs.show_status,
        "the runs that were submitted: state, attempts, progress, time left, last error",
        "[RUN ... or CONFIG [key=value ...]]",
        "dsno-cluster status",
        [options.json_output, options.all_runs],
    ),
    "logs": Command(
        runs.show_logs,
        "what a task of a run prints",
        "[RUN]",
        "dsno-cluster logs imagenet64-train-20260101-120000 --follow --rank 3",
        [options.log_choice],
    ),
    "cancel": Command(
        runs.cancel_runs,
        "end runs; what is done is kept",
        "RUN ...",
        "dsno-cluster cancel imagenet64-train-20260101-120000",
    ),
    "sample": Command(
        models.sample_student,
        "images from a trained student, as a picture, arrays or shards",
        "STUDENT [key=value ...]",
        "dsno-cluster sample configs/digits.yaml --num 64 --seed 2 --out grid.png",
        [options.sampling, options.actors, options.endpoint],
    ),
    "verify": Command(
        trajectories.verify_trajectories,
        "check every byte of a data set, a config's or the one of a folder or address, against its manifest",
        "DATA_SET [key=value ...]",
        "dsno-cluster verify configs/digits.yaml",
        [options.json_output, options.endpoint],
    ),
    "inspect": Command(
        trajectories.inspect_trajectories,
        "what a data set holds: spec, sizes, statistics by time point, a picture",
        "DATA_SET [key=value ...]",
        "dsno-cluster inspect configs/digits.yaml --out trajectories.png",
        [options.inspecting],
    ),
    "export": Command(
        exchange.export_trajectories,
        "write a data set as files that other trainers read: WebDataset tars, LMDB, numpy arrays",
        "DATA_SET [key=value ...]",
        "dsno-cluster export configs/digits.yaml --format webdataset --out digits-paths",
        [options.exporting],
    ),
    "import-trajectories": Command(
        exchange.import_trajectories,
        "turn trajectories that somebody else made into shards that students train on",
        "SOURCE",
        "dsno-cluster import-trajectories digits-paths --out runs",
        [options.importing_trajectories],
    ),
    "inspect-teacher": Command(
        teachers.inspect_teacher,
        "what a teacher is: family, shape, classes, noise levels, licence; and the YAML to use it",
        "PATH [option=value ...]",
        "dsno-cluster inspect-teacher package:digits-teacher",
        [options.json_output, options.endpoint],
    ),
    "fetch-teacher": Command(
        teachers.fetch_teacher,
        "download a teacher from the Hugging Face hub or its authors, and pin its revision and sha256",
        "NAME",
        "dsno-cluster fetch-teacher google/ddpm-cifar10-32",
        [options.fetching],
    ),
    "import-weights": Command(
        models.import_model,
        "turn a published DSNO student or progressive-distillation teacher into a dsno-cluster model folder",
        "CHECKPOINT",
        "dsno-cluster import-weights imagenet64-16/checkpoint --config imagenet64.yaml --out teachers/imagenet64-16",
        [options.importing],
    ),
    "train-teacher": Command(
        training.train_teacher,
        "train a small teacher on real images",
        "[CONFIG] [key=value ...]",
        "dsno-cluster train-teacher configs/digits.yaml",
        [options.dry_run],
    ),
    "demo": Command(
        pipeline.run_demo,
        "the whole path on real handwritten digits, ending in a picture",
        "[CONFIG] [key=value ...]",
        "dsno-cluster demo --launcher local",
        [options.on_this_machine, options.dry_run],
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        try:
            with _sigterm_interrupts():
                status = _run([word for word in argv if word != "--debug"])
        except SystemExit as done:  # argparse's, after --help
            status = int(done.code or 0)
        sys.stdout.flush()
        return status
    except (UserError, WorkError) as error:
        if debug:
            raise
        from dsno_cluster import console

        console.error(str(error))
        return 2 if isinstance(error, UserError) else 1
    except Unwatched as unwatched:
        from dsno_cluster import console

        run = unwatched.args[0]
        console.error(
            f"no longer followed; the job continues: `dsno-cluster status`, or end it with `dsno-cluster cancel {run}`"
        )
        return 130
    except BrokenPipeError:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            raise  # the broken pipe was another one
        # the reader of our output, such as `head`, has enough: the rest must not be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or error.errno not in _OF_THE_DISK or error.filename is None:
            raise
        from dsno_cluster import console

        console.error(f"{error.filename}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        from dsno_cluster import console

        console.error("interrupted; the same command resumes")
        return 130


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """In this context SIGTERM acts like Ctrl-C; a second one ends the process at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except SystemExit as stopped:
        if stopped.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None  # Ray turns SIGTERM into SystemExit while it starts
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = closest(name, COMMANDS)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}; {hint}")
    COMMANDS[name].run(_parse(name, rest))
    return 0


def _parse(name: str, rest: list[str]) -> Arguments:
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"dsno-cluster {name}",
        usage=f"dsno-cluster {name} {command.usage} [options]",
        description=command.help,
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for add in command.options:
        add(parser)
    # argparse cannot mix positional words and options freely; the words that it does not know are sorted here
    parsed, extras = parser.parse_known_args(rest)
    unknown = [word for word in extras if word.startswith("-")]
    if unknown:
        known = [s for action in parser._actions for s in action.option_strings if s.startswith("--")]
        near, override = closest(unknown[0].split("=")[0], known), unknown[0].lstrip("-")
        hint = f"did you mean {near}?" if near else f"options: {', '.join(known)}"
        if near is None and _OVERRIDE.match(override):
            hint = f"a key of the config is set without hyphens before it: {override}"
        raise UserError(f"unknown option {unknown[0]}; {hint}")
    overrides = [word for word in extras if _OVERRIDE.match(word)]
    words = [word for word in extras if not _OVERRIDE.match(word)]
    return Arguments(parsed, words, overrides, shlex.join(["dsno-cluster", name, *rest]))


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [
        "usage: dsno-cluster COMMAND [CONFIG] [key=value ...] [options]",
        "",
        "Teacher trajectories, DSNO training and evaluation, on a laptop or a Slurm cluster.",
        f"CONFIG is {DEFAULT_CONFIG} if it is left out; key=value overrides a key of it, such as training.lr=1e-4.",
        "",
        *(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()),
        "",
        "`dsno-cluster COMMAND --help` shows a command's options. --debug shows tracebacks.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
