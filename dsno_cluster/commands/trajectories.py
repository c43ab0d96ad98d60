"""The commands of trajectory data sets: gen-trajectories, plan, verify, inspect."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.commands.launching import run_stage
from dsno_cluster.errors import UserError, WorkError

if TYPE_CHECKING:
    from dsno_cluster.config import Config

PROBES = 32  # samples on which a plan measures
DATA_SET = "DATA_SET: its config, its folder or s3:// address, or its manifest.json"


def gen_trajectories(arguments: Arguments) -> None:
    from dsno_cluster.stages import GEN_TRAJECTORIES

    asked = arguments.options
    if asked.array > 1 and asked.nodes not in (None, 1):
        raise UserError(
            f"--nodes {asked.nodes} with --array {asked.array}: each task of an array has one node"
        )
    options = GEN_TRAJECTORIES.options(
        actors=asked.actors, gpus_per_actor=asked.gpus_per_actor, array=asked.array
    )
    run_stage(arguments, GEN_TRAJECTORIES, arguments.config(), options)


def plan_trajectories(arguments: Arguments) -> None:
    from dsno_cluster import console
    from dsno_cluster.config import load_profile
    from dsno_cluster.evaluation import forecast
    from dsno_cluster.evaluation.given_files import problems_of_files
    from dsno_cluster.teachers import NoTeacher
    from dsno_cluster.trajectories import plan, precision

    config, options = arguments.config(), arguments.options
    measuring = options.measure or options.tolerance
    unused = [f"--{name}" for name in ("probes", "nodes") if getattr(options, name) and not measuring]
    if unused:
        raise UserError(f"{' and '.join(unused)}: used only with --measure or --tolerance E")
    probes = options.probes or PROBES
    found, planned = plan.Found(), None
    stages = forecast.Stages()
    chosen = faster = None
    if measuring:
        from dsno_cluster.device import compute_device
        from dsno_cluster.stages import GEN_TRAJECTORIES

        planned = plan.make_plan(config)
        teacher = planned.teacher.load(compile=planned.spec.compiled).to(compute_device())
        profile = load_profile(GEN_TRAJECTORIES.name, {"nodes": options.nodes})
        devices = forecast.devices_of(profile, config.trajectories.threads)
        if profile.gpus_per_node and teacher.device.type == "cpu":
            console.say(
                f"jobs/{GEN_TRAJECTORIES.name}.yaml asks for GPUs and this machine has none: the time is measured on its CPU"
            )
        error = None
        if options.tolerance:
            config, error = plan.choose_solver(config, planned, teacher, options.tolerance, probes)
            planned = plan.make_plan(config, planned.teacher.solved_as(config))
        cost = plan.measure_cost(planned, teacher, devices)
        if error is None and planned.teacher.own_steps is None:
            error = plan.measure_errors(planned, teacher, probes)
        found = plan.Found(cost, error)
        chosen = precision.measure_precision(planned, teacher, probes)
        faster = precision.measure_faster(planned, teacher, probes) if teacher.device.type == "cuda" else None
        stages = forecast.measure_stages(config, planned, teacher, cost.seconds_per_evaluation)
    problems: list[UserError | WorkError] = []
    if not measuring:
        try:
            planned = plan.make_plan(config)
        except (NoTeacher, WorkError) as reason:  # a teacher that does not fit raises UserError instead
            problems.append(reason)
        found = plan.Found(problem=str(problems[0]) if problems else None)
    of_files = problems_of_files(config)
    found = replace(found, files=tuple(map(str, of_files)))
    memory = forecast.estimate_memory(config, planned.teacher if planned else None)
    if options.json:
        more = precision.as_values(chosen, faster, found.error) | forecast.as_values(memory, stages)
        print(plan.as_json(config, planned, found, **more))
    else:
        lines = precision.report_precision(chosen, faster, found) + forecast.report(config, memory, stages)
        print("\n".join([plan.report(config, planned, found), *lines]))
    if options.tolerance and not options.json:
        settings = config.trajectories
        use = {"solver": settings.solver, "steps": settings.steps, "grid": settings.grid}
        print(f"use           {' '.join(f'trajectories.{key}={value}' for key, value in use.items())}")
    for problem in [*problems, *of_files]:  # after the arithmetic, which holds all the same
        raise problem


def verify_trajectories(arguments: Arguments) -> None:
    address, endpoint_url = arguments.address(DATA_SET, data_set_address)
    from dsno_cluster.trajectories.shards import REPAIR
    from dsno_cluster.trajectories.verify import verify

    report = verify(address, endpoint_url)
    if arguments.options.json:
        print(json.dumps(report))
    elif not report["problems"]:
        print(
            f"{report['shards']} shards, {report['samples']} samples, {report['bytes']} bytes: all as the manifest says"
        )
    if report["problems"]:
        raise WorkError(f"{address}: {'; '.join(report['problems'])}; delete what is wrong, and {REPAIR}")


def inspect_trajectories(arguments: Arguments) -> None:
    options = arguments.options
    address, endpoint_url = arguments.address(DATA_SET, data_set_address)
    if options.out is not None and not options.out.endswith(".png"):
        raise UserError(f"--out {options.out}: must end in .png")
    from dsno_cluster.trajectories.inspect import describe, inspect, rows

    found = inspect(address, options.shards, options.out, endpoint_url)
    if options.json:
        print(found.model_dump_json())
        return
    from dsno_cluster import console

    print(describe(found))
    console.table(f"states of {found.samples_read:,} trajectories", *rows(found))
    if options.out is not None:
        channels = found.spec.shape[0]
        shown = f" (the first three of {channels} channels as colours)" if channels > 3 else ""
        print(f"picture: {options.out}{shown}")


def data_set_address(config: Config) -> str:
    """The address of a config's data set."""
    from dsno_cluster.trajectories.plan import make_plan
    from dsno_cluster.trajectories.spec import imported_folder

    imported = config.trajectories.imported
    folder = imported_folder(imported) if imported else make_plan(config).folder
    return f"{config.storage.root.rstrip('/')}/{folder}"
