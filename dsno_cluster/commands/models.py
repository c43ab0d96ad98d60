"""The commands of single models: sample, import-weights."""

from __future__ import annotations

from dataclasses import replace

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.errors import UserError


def sample_student(arguments: Arguments) -> None:

    options = arguments.options
    what = "STUDENT: its config, or its folder such as runs/students/digits, on disk or on S3"
    checkpoint, endpoint_url = arguments.address(what, lambda config: config.student_address)
    if not 0 <= options.seed < 2**31:
        raise UserError(f"--seed {options.seed}: must lie in 0..{2**31 - 1}")
    if options.shards is not None and options.out is not None:
        raise UserError("--out and --shards: a file or shards, one at a time")
    options.out = options.out or "samples.png"
    if options.shards is None and not options.out.endswith((".png", ".npz")):
        raise UserError(f"--out {options.out}: must end in .png (a grid) or .npz (arrays)")
    if options.shards is None and (options.actors or options.gpus_per_actor or options.ray_address):
        raise UserError(
            "--actors, --gpus-per-actor and --ray-address need --shards URL: a file is drawn by this process"
        )
    if options.states and (options.shards is not None or options.decoder):
        raise UserError(
            "--states: states are written to a file, --out, and not decoded: without --shards and --decoder"
        )
    if options.refine is None and (options.refine_from is not None or options.teacher):
        raise UserError("--refine-from and --teacher need --refine K")
    if options.refine_from is not None and not 0.0 < options.refine_from < 1.0:
        raise UserError(f"--refine-from {options.refine_from}: must lie between 0 (data) and 1 (noise)")
    from dsno_cluster.evaluation.sample import Drawing, Refinement, sample_to_file, states_of_student

    refinement = Refinement(options.refine, options.refine_from, options.teacher) if options.refine else None
    drawing = Drawing(
        checkpoint,
        endpoint_url,
        precision=options.precision,
        compile=options.compile,
        refinement=refinement,
        label=options.label,
        raw=options.states,
    )
    if options.decoder:
        drawing = replace(drawing, states=states_of_student(drawing, options.decoder))
    if options.shards is None:
        sample_to_file(drawing, options.out, options.num, options.seed, options.batch_size)
        return
    from dsno_cluster.cluster.crew import Crew
    from dsno_cluster.evaluation.sample_shards import sample_to_shards

    sample_to_shards(
        drawing,
        options.shards,
        options.num,
        options.seed,
        options.batch_size,
        Crew(options.actors, options.gpus_per_actor, options.ray_address),
    )


def import_model(arguments: Arguments) -> None:
    source = arguments.only_word("CHECKPOINT: a published student or teacher")
    from dsno_cluster import console
    from dsno_cluster.teachers.importing import import_weights

    options = arguments.options
    kind = import_weights(source, options.config, options.out, options.endpoint_url, arguments.command_line)
    use = f"teacher.path={options.out}" if kind == "teacher" else f"dsno-cluster sample {options.out}"
    console.say(f"{kind} written: {options.out}; use it with {use}")
