"""The command line. Heavy libraries are imported inside the command that needs them.

`dsno-cluster COMMAND [CONFIG] [key=value ...] [options]`. Exit status: 0 done, 1 the work or its surroundings
failed, 2 the input is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from dsno_cluster import __version__
from dsno_cluster.errors import UserError, WorkError

if TYPE_CHECKING:
    from dsno_cluster.cluster.runs import Run
    from dsno_cluster.config import Config, Profile

DEFAULT_CONFIG = "configs/digits.yaml"
_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=")


@dataclass(frozen=True)
class Arguments:
    """A parsed command line: its options, its positional words and its key=value overrides."""

    options: argparse.Namespace
    words: list[str]
    overrides: list[str]
    command_line: str

    def config(self) -> Config:
        """The experiment named, or the default one. Raises UserError for more than one."""
        from dsno_cluster.config import load_config

        if len(self.words) > 1:
            raise UserError(
                f"one config at a time, found {' '.join(self.words)}; an override is written key=value"
            )
        return load_config(self.words[0] if self.words else DEFAULT_CONFIG, self.overrides)


@dataclass(frozen=True)
class Command:
    """A command: what it does, in a line; its positional arguments; its options; an example."""

    run: Callable[[Arguments], None]
    help: str
    usage: str
    example: str
    options: list[Callable[[argparse.ArgumentParser], None]] = field(default_factory=list)


class Unwatched(KeyboardInterrupt):
    """Ctrl-C while a job of Slurm was followed: the job goes on."""


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError with one line in place of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        return _run([word for word in argv if word != "--debug"])
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
            f"no longer followed; the job goes on: `dsno-cluster status`, or end it with `dsno-cluster cancel {run}`"
        )
        return 130
    except KeyboardInterrupt:
        from dsno_cluster import console

        console.error("interrupted; the same command continues")
        return 130


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}; {hint}")
    COMMANDS[name].run(_parse(name, rest))
    return 0


def _parse(name: str, rest: list[str]) -> Arguments:
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"dsno-cluster {name}",
        usage=f"dsno-cluster {name} {command.usage} [options]",
        description=command.help,
        epilog=f"example: {command.example}",
        allow_abbrev=False,
    )
    for add in command.options:
        add(parser)
    # argparse cannot mix positional words and options freely; what it does not know is sorted here
    options, extras = parser.parse_known_args(rest)
    unknown = [word for word in extras if word.startswith("-")]
    if unknown:
        known = [s for action in parser._actions for s in action.option_strings if s.startswith("--")]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        raise UserError(
            f"unknown option {unknown[0]}; {f'did you mean {near[0]}?' if near else 'options: ' + ', '.join(known)}"
        )
    overrides = [word for word in extras if _OVERRIDE.match(word)]
    words = [word for word in extras if not _OVERRIDE.match(word)]
    return Arguments(options, words, overrides, " ".join(["dsno-cluster", name, *rest]))


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [
        "usage: dsno-cluster COMMAND [CONFIG] [key=value ...] [options]",
        "",
        "Teacher trajectories, DSNO training and evaluation, on a laptop or a Slurm cluster.",
        f"CONFIG is {DEFAULT_CONFIG} where it is left out; key=value overrides a key of it, such as training.lr=1e-4.",
        "",
        *(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()),
        "",
        "`dsno-cluster COMMAND --help` shows a command's options. --debug shows tracebacks.",
    ]
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _launching(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launcher", choices=("auto", "local", "slurm"), default="auto", help="where to run (default: auto)"
    )
    parser.add_argument(
        "--nodes", type=_positive, metavar="N", help="nodes (default: the profile's in jobs/)"
    )
    parser.add_argument(
        "--wait", action="store_true", help="on Slurm: follow the job to its end, exit with its status"
    )
    _dry_run(parser)


def _on_this_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--launcher", choices=("local",), default="local", help="always this machine")


def _dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")


def _actors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--actors",
        type=_positive,
        metavar="N",
        help="Ray actors (default: one a GPU, or cores / threads)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="a Ray cluster to use, such as 10.0.0.1:6379 or auto (default: RAY_ADDRESS, or a Ray of our own here)",
    )


def _tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks-per-node",
        type=_positive,
        metavar="N",
        help="training processes per node (default: 1 here, on Slurm the profile's)",
    )


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, nothing else there"
    )


def _all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="every run, not the newest ones alone")


def _log_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")
    parser.add_argument("--rank", type=_natural, default=0, metavar="K", help="of which task (default: 0)")
    parser.add_argument(
        "--attempt", type=_natural, metavar="N", help="of which attempt, from 0 (default: the newest)"
    )


def _student(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--student", metavar="PATH", help="a run, step or import folder (default: the config's newest)"
    )


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num", type=_positive, default=64, metavar="N", help="how many images (default: 64)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and labels (default: 0)")
    parser.add_argument(
        "--out", default="samples.png", metavar="FILE", help=".png (a grid) or .npz (default: samples.png)"
    )
    parser.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="images at a time (default: 64)"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the student (default: float32)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the student: slow to begin, then faster"
    )
    parser.add_argument(
        "--refine",
        type=_positive,
        metavar="K",
        help="finish the student's state at a time with K steps of its teacher",
    )
    parser.add_argument(
        "--refine-from",
        type=float,
        metavar="T",
        help="that time (default: the student's own nearest to 0.25)",
    )
    parser.add_argument(
        "--teacher", metavar="PATH", help="the teacher to refine with (default: the student's)"
    )
    parser.add_argument("--endpoint-url", metavar="URL", help="S3 endpoint of the checkpoint")


def _planning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes", type=_positive, metavar="N", help="nodes (default: the profile's in jobs/)"
    )
    parser.add_argument(
        "--measure", action="store_true", help="time the teacher here and measure the solver's error"
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="E",
        help="find the cheapest solver and steps whose relative error is below E at every time point",
    )
    parser.add_argument(
        "--probes", type=_positive, default=32, metavar="N", help="samples to measure on (default: 32)"
    )
    _json(parser)


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1, such as 1e-3")
    return value


def _inspecting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards", type=_positive, default=8, metavar="N", help="how many shards to read (default: 8)"
    )
    parser.add_argument("--out", metavar="FILE", help="a picture of a few trajectories to write, .png")
    _json(parser)
    _endpoint(parser)


def _importing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="YAML", help="the published model's config")
    parser.add_argument("--out", required=True, metavar="DIR", help="the model folder to write")
    _endpoint(parser)


def _endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint-url", metavar="URL", help="S3 endpoint")


def _launcher_and_profile(arguments: Arguments, stage: str) -> tuple[str, Profile]:
    from dsno_cluster import console
    from dsno_cluster.cluster.ray_pool import given_address
    from dsno_cluster.cluster.submit import choose_launcher

    options = arguments.options
    asked = options.launcher
    address = given_address(options.ray_address) if hasattr(options, "ray_address") else None
    if address is not None:  # its actors are driven from here: a job of Slurm would start a Ray of its own
        if asked == "slurm":
            raise UserError(
                f"--launcher slurm: a Ray cluster is given, {address}; leave out --ray-address and unset RAY_ADDRESS, or take "
                "--launcher local to use it"
            )
        if asked == "auto":
            console.say(f"using the Ray cluster {address} from this machine")
        asked = "local"
    launcher = choose_launcher(asked, options.nodes or 1)
    if launcher == "local" and options.wait:
        raise UserError("--wait: a stage on this machine is waited for anyway")
    return launcher, _profile(arguments, stage, on_slurm=launcher == "slurm")


def _profile(arguments: Arguments, stage: str, *, on_slurm: bool) -> Profile:
    from dsno_cluster.config import load_profile

    options = arguments.options
    tasks = getattr(options, "tasks_per_node", None) if stage == "train" else None
    return load_profile(stage, {"nodes": options.nodes, "tasks_per_node": tasks}, on_slurm=on_slurm)


def _submit_to_slurm(arguments: Arguments, config: Config, profile: Profile, stage: str) -> None:
    """Submit a stage; with --wait, follow it to its end."""
    from dsno_cluster import console
    from dsno_cluster.cluster.status import wait_for
    from dsno_cluster.cluster.submit import sbatch_script, stage_task, submit_to_slurm

    options = arguments.options
    if options.dry_run:
        print(sbatch_script(stage, config, profile))
        return
    task = stage_task(stage, config, getattr(options, "actors", None), getattr(options, "student", None))
    run = submit_to_slurm(task, config, profile, arguments.command_line)
    _say_submitted(run)
    if getattr(options, "json", False):
        print(json.dumps({"run": run.id, "job": run.record()["job"], "folder": str(run.folder)}))
    if options.wait:
        try:
            console.say(f"done: {wait_for(run)}")
        except KeyboardInterrupt:
            raise Unwatched(run.id) from None


def _say_submitted(run: Run) -> None:
    from dsno_cluster import console

    record = run.record()
    console.say(
        f"submitted {record['stage']} of {record['name']} as Slurm job {record['job']}: `dsno-cluster status {run.id}`, "
        f"`dsno-cluster logs {run.id} --follow`; files: {run.folder}"
    )


def _gen_trajectories(arguments: Arguments) -> None:
    from dsno_cluster.trajectories.plan import make_plan

    config = arguments.config()
    plan = make_plan(config)  # what is missing is said before anything starts or is submitted
    launcher, profile = _launcher_and_profile(arguments, "gen-trajectories")
    if launcher == "slurm":
        _submit_to_slurm(arguments, config, profile, "gen-trajectories")
        return
    from dsno_cluster.trajectories.generate import describe_plan, generate

    actors = arguments.options.actors
    if arguments.options.dry_run:
        print(f"would make {describe_plan(config, plan, actors)}")
        return
    generate(config, actors, arguments.options.ray_address)


def _plan(arguments: Arguments) -> None:
    from dsno_cluster.config import load_profile
    from dsno_cluster.trajectories import plan

    config, options = arguments.config(), arguments.options
    profile = load_profile("gen-trajectories", {"nodes": options.nodes})
    a_node = profile.gpus_per_node or max(1, profile.cpus_per_task // config.trajectories.threads)
    measured = error = native = None
    if options.measure or options.tolerance:
        from dsno_cluster.device import compute_device

        plan.find_teacher(config)
        teacher = plan.open_teacher(config).to(compute_device())
        native = plan.own_steps(config, teacher)
        if options.tolerance:
            config, error = plan.choose_solver(config, teacher, options.tolerance, options.probes)
        elif native is None:
            error = plan.measure_errors(config, teacher, options.probes)
        measured = plan.measure_cost(config, teacher, profile.nodes * a_node)
    elif config.teacher.options.get("schedule") == "native":  # its own steps may be one more than asked for
        native = plan.own_steps(config, plan.find_teacher(config))
    show = plan.as_json if options.json else plan.report
    print(show(config, plan.size_of(config, native), measured=measured, error=error))
    if options.tolerance and not options.json:
        settings = config.trajectories
        chosen = {"solver": settings.solver, "steps": settings.steps, "grid": settings.grid}
        print(f"use           {' '.join(f'trajectories.{key}={value}' for key, value in chosen.items())}")


def _train(arguments: Arguments) -> None:
    config = arguments.config()
    from dsno_cluster.training.engine import check_divides, launched_as_rank
    from dsno_cluster.training.loop import find_trajectories

    if launched_as_rank() and not arguments.options.dry_run:  # by torchrun or the like, which sets RANK
        from dsno_cluster.training.loop import train

        train(config)
        return
    tasks = arguments.options.tasks_per_node or 1
    check_divides(config, tasks)
    folder, _ = find_trajectories(config)  # what is missing is said before anything starts or is submitted
    launcher, profile = _launcher_and_profile(arguments, "train")
    if launcher == "slurm":
        check_divides(config, profile.nodes * profile.tasks_per_node)
        _submit_to_slurm(arguments, config, profile, "train")
        return
    if arguments.options.dry_run:
        print(
            f"would train {config.name} for {config.training.steps} steps of batch {config.training.batch_size} on "
            f"{config.storage.root}/{folder} in {tasks} process(es) on this machine"
        )
        return
    if tasks == 1:
        from dsno_cluster.training.loop import train

        train(config)
        return
    from dsno_cluster import console
    from dsno_cluster.cluster.local import follow
    from dsno_cluster.cluster.submit import stage_task, submit_locally

    run, job = submit_locally(stage_task("train", config), config, profile, arguments.command_line)
    console.say(f"training in {tasks} processes; logs: {run.folder}/submitit")
    follow(run, job)


def _eval(arguments: Arguments) -> None:
    config = arguments.config()
    from dsno_cluster.evaluation.evaluate import find_student

    path, _ = find_student(config, arguments.options.student)
    launcher, profile = _launcher_and_profile(arguments, "eval")
    if launcher == "slurm":
        _submit_to_slurm(arguments, config, profile, "eval")
        return
    from dsno_cluster.cluster.ray_pool import actor_count

    actors = arguments.options.actors
    if arguments.options.dry_run:
        text = (
            f"would evaluate {path} with {config.evaluation.num_samples} samples, "
            f"metrics {', '.join(config.evaluation.metrics)}, {actor_count(actors, config.evaluation.threads)}"
        )
        print(json.dumps({"dry_run": text}) if arguments.options.json else text)
        return
    from dsno_cluster.evaluation.evaluate import evaluate

    metrics = evaluate(config, arguments.options.student, actors, arguments.options.ray_address)
    if arguments.options.json:
        print(json.dumps(metrics))
    else:
        _show(metrics)


def _show(metrics: dict[str, Any]) -> None:
    from dsno_cluster import console
    from dsno_cluster.evaluation.report import error_lines, table_rows

    header, rows = table_rows(metrics)
    count = metrics["num_samples"]
    console.table(f"{count} samples, {metrics['feature_extractor']['name']}", header, rows)
    lines = error_lines(metrics)
    if lines:
        print("relative error of the student's trajectory on held-out noise: " + ", ".join(lines))


def _run_pipeline(arguments: Arguments) -> None:
    from dsno_cluster.pipeline import STAGES, describe, run_here
    from dsno_cluster.training.engine import check_divides
    from dsno_cluster.trajectories.plan import make_plan

    config, options = arguments.config(), arguments.options
    make_plan(config)  # what is missing is said before anything starts or is submitted
    launcher, _ = _launcher_and_profile(arguments, STAGES[0])
    if launcher == "local":
        if options.dry_run:
            print(f"would make {describe(config)}")
            return
        _show(run_here(config))
        return
    profiles = {stage: _profile(arguments, stage, on_slurm=True) for stage in STAGES}
    check_divides(config, profiles["train"].nodes * profiles["train"].tasks_per_node)
    from dsno_cluster import console
    from dsno_cluster.cluster.status import wait_for
    from dsno_cluster.cluster.submit import sbatch_script, submit_pipeline

    if options.dry_run:
        for stage, profile in profiles.items():
            print(f"# {stage}\n{sbatch_script(stage, config, profile)}")
        return
    runs = submit_pipeline(config, profiles, arguments.command_line)
    for run in runs:
        _say_submitted(run)
    if options.wait:
        try:
            for run in runs:
                console.say(f"done: {wait_for(run)}")
        except KeyboardInterrupt:
            raise Unwatched(run.id) from None


def _status(arguments: Arguments) -> None:
    from dsno_cluster.cluster import status
    from dsno_cluster.cluster.runs import all_runs, find_run

    if arguments.overrides:
        raise UserError(f"status takes runs, not {arguments.overrides[0]}")
    options = arguments.options
    runs = [find_run(word) for word in arguments.words] or all_runs()
    shown = runs if arguments.words or options.all else runs[: status.SHOWN]
    rows = status.overview(shown)
    if options.json:
        print(json.dumps({"runs": rows}))
        return
    from dsno_cluster import console

    if not rows:
        print("no runs yet; `dsno-cluster gen-trajectories --nodes 2` submits one where there is Slurm")
        return
    console.table("runs, newest first", *status.table_rows(rows))
    if len(shown) < len(runs):
        print(f"{len(runs) - len(shown)} older ones: --all")
    for row in rows if arguments.words else []:
        code = row["code"] or {}
        commit = (
            f", commit {code['commit'][:12]}{' with changes' if code['dirty'] else ''}"
            if code.get("commit")
            else ""
        )
        print(f"{row['run']}: version {code.get('version')}{commit}; files: {row['folder']}")


def _logs(arguments: Arguments) -> None:
    from dsno_cluster.cluster.runs import all_runs, find_run
    from dsno_cluster.cluster.status import log_lines

    options = arguments.options
    if len(arguments.words) > 1 or arguments.overrides:
        raise UserError("name one RUN (`dsno-cluster status` lists them), or none for the newest")
    newest = all_runs()[:1]
    if not arguments.words and not newest:
        raise UserError("there are no runs yet")
    run = find_run(arguments.words[0]) if arguments.words else newest[0]
    for line in log_lines(run, options.rank, options.attempt, options.follow):
        print(line, flush=True)


def _cancel(arguments: Arguments) -> None:
    from dsno_cluster import console
    from dsno_cluster.cluster.runs import find_run
    from dsno_cluster.cluster.status import cancel

    if not arguments.words or arguments.overrides:
        raise UserError("name the RUN to cancel (`dsno-cluster status` lists them)")
    for run in [find_run(word) for word in arguments.words]:
        console.say(f"{run.id}: {cancel(run)}; what is done is kept, the same command continues")


def _train_teacher(arguments: Arguments) -> None:
    config = arguments.config()
    if arguments.options.dry_run:
        settings = config.teacher_training
        print(
            f"would train a teacher on {config.data.name} for {settings.steps} steps of batch {settings.batch_size}"
        )
        return
    from dsno_cluster import console
    from dsno_cluster.training.teacher import train_teacher

    address = train_teacher(config, arguments.command_line)
    console.say(f"done: {address}; use it with teacher.path={address}")


def _sample(arguments: Arguments) -> None:
    if len(arguments.words) != 1 or arguments.overrides:
        raise UserError("name one CHECKPOINT: a run, step or import folder, on disk or on S3")
    options = arguments.options
    if not 0 <= options.seed < 2**31:
        raise UserError(f"--seed {options.seed}: must lie in 0..{2**31 - 1}")
    if not options.out.endswith((".png", ".npz")):
        raise UserError(f"--out {options.out}: must end in .png (a grid) or .npz (arrays)")
    if options.refine is None and (options.refine_from is not None or options.teacher):
        raise UserError("--refine-from and --teacher go with --refine K")
    if options.refine_from is not None and not 0.0 < options.refine_from < 1.0:
        raise UserError(f"--refine-from {options.refine_from}: must lie between 0 (data) and 1 (noise)")
    from dsno_cluster.evaluation.sample import Refinement, sample_to_file

    refinement = Refinement(options.refine, options.refine_from, options.teacher) if options.refine else None
    sample_to_file(
        arguments.words[0],
        options.out,
        options.num,
        options.seed,
        options.batch_size,
        options.endpoint_url,
        precision=options.precision,
        compile=options.compile,
        refinement=refinement,
    )


def _verify(arguments: Arguments) -> None:
    if len(arguments.words) != 1 or arguments.overrides:
        raise UserError("name one FOLDER_OR_URL: a data set's folder, or its manifest.json")
    from dsno_cluster.trajectories.verify import verify

    report = verify(arguments.words[0], arguments.options.endpoint_url)
    if arguments.options.json:
        print(json.dumps(report))
    elif not report["problems"]:
        print(
            f"{report['shards']} shards, {report['samples']} samples, {report['bytes']} bytes: all as the manifest says"
        )
    if report["problems"]:
        raise WorkError(f"{arguments.words[0]}: " + "; ".join(report["problems"]))


def _inspect(arguments: Arguments) -> None:
    options = arguments.options
    if len(arguments.words) != 1 or arguments.overrides:
        raise UserError("name one FOLDER_OR_URL: a data set's folder, or its manifest.json")
    if options.out is not None and not options.out.endswith(".png"):
        raise UserError(f"--out {options.out}: must end in .png")
    from dsno_cluster.trajectories.inspect import describe, inspect, rows

    found = inspect(arguments.words[0], options.shards, options.out, options.endpoint_url)
    if options.json:
        print(json.dumps(found))
        return
    from dsno_cluster import console

    print(describe(found))
    console.table(f"states of {found['samples_read']:,} trajectories", *rows(found))
    if options.out is not None:
        print(f"picture: {options.out}")


def _import_weights(arguments: Arguments) -> None:
    if len(arguments.words) != 1 or arguments.overrides:
        raise UserError("name one SRC: a published checkpoint")
    from dsno_cluster import console
    from dsno_cluster.models.importers import import_weights

    options = arguments.options
    kind = import_weights(
        arguments.words[0], options.config, options.out, options.endpoint_url, arguments.command_line
    )
    use = f"teacher.path={options.out}" if kind == "teacher" else f"dsno-cluster sample {options.out}"
    console.say(f"{kind} written: {options.out}; use it with {use}")


def _demo(arguments: Arguments) -> None:
    from dsno_cluster.pipeline import describe, run_here
    from dsno_cluster.trajectories.plan import make_plan

    config = arguments.config()
    make_plan(config)
    if arguments.options.dry_run:
        print(f"would make {describe(config)}")
        return
    _show(run_here(config))
    print(f"\nlook at {config.storage.root}/evaluation/{config.name}/samples.png")


COMMANDS = {
    "gen-trajectories": Command(
        _gen_trajectories,
        "solve the teacher's ODE for many noises: trajectory shards and their manifest",
        "[CONFIG] [key=value ...]",
        "dsno-cluster gen-trajectories configs/digits.yaml trajectories.num_samples=4000 --actors 2",
        [_launching, _actors],
    ),
    "plan": Command(
        _plan,
        "what gen-trajectories will cost: shards, bytes, evaluations; time and accuracy where asked",
        "[CONFIG] [key=value ...]",
        "dsno-cluster plan configs/digits.yaml --tolerance 1e-3 --nodes 4",
        [_planning],
    ),
    "train": Command(
        _train,
        "train the student on trajectories, with DeepSpeed",
        "[CONFIG] [key=value ...]",
        "dsno-cluster train configs/digits.yaml training.lr=1e-4 --tasks-per-node 2 --launcher local",
        [_launching, _tasks],
    ),
    "eval": Command(
        _eval,
        "sample from the student and measure: distances, table, pictures",
        "[CONFIG] [key=value ...]",
        "dsno-cluster eval configs/digits.yaml evaluation.num_samples=1000 --json",
        [_launching, _actors, _student, _json],
    ),
    "run": Command(
        _run_pipeline,
        "all three stages: on Slurm as jobs that wait for each other, here one after the other",
        "[CONFIG] [key=value ...]",
        "dsno-cluster run configs/imagenet64.yaml --nodes 16",
        [_launching],
    ),
    "status": Command(
        _status,
        "the runs that were submitted: state, attempts, progress, time left, last error",
        "[RUN ...]",
        "dsno-cluster status",
        [_json, _all],
    ),
    "logs": Command(
        _logs,
        "what a task of a run prints",
        "[RUN]",
        "dsno-cluster logs imagenet64-train-20260101-120000 --follow --rank 3",
        [_log_choice],
    ),
    "cancel": Command(
        _cancel,
        "end runs; what is done is kept",
        "RUN ...",
        "dsno-cluster cancel imagenet64-train-20260101-120000",
    ),
    "sample": Command(
        _sample,
        "images from a trained student, as a picture or arrays",
        "CHECKPOINT",
        "dsno-cluster sample runs/students/digits --num 64 --seed 0 --out grid.png",
        [_sampling],
    ),
    "verify": Command(
        _verify,
        "check every byte of a data set against its manifest",
        "FOLDER_OR_URL",
        "dsno-cluster verify runs/trajectories/0123456789abcdef",
        [_json, _endpoint],
    ),
    "inspect": Command(
        _inspect,
        "what a data set holds: spec, sizes, statistics by time point, a picture",
        "FOLDER_OR_URL",
        "dsno-cluster inspect runs/trajectories/0123456789abcdef --out trajectories.png",
        [_inspecting],
    ),
    "import-weights": Command(
        _import_weights,
        "a published DSNO student or progressive-distillation teacher as a model folder of ours",
        "SRC",
        "dsno-cluster import-weights imagenet64-16/checkpoint --config imagenet64.yaml --out teachers/imagenet64-16",
        [_importing],
    ),
    "train-teacher": Command(
        _train_teacher,
        "train a small teacher on real images",
        "[CONFIG] [key=value ...]",
        "dsno-cluster train-teacher configs/digits.yaml",
        [_dry_run],
    ),
    "demo": Command(
        _demo,
        "the whole path on real handwritten digits, ending in a picture",
        "[CONFIG] [key=value ...]",
        "dsno-cluster demo --launcher local",
        [_on_this_machine, _dry_run],
    ),
}

if __name__ == "__main__":
    sys.exit(main())
