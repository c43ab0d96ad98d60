"""The commands that train: train, train-teacher."""

from __future__ import annotations

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.commands.launching import run_stage
from dsno_cluster.errors import UserError


def train_student(arguments: Arguments) -> None:
    config = arguments.config()
    from dsno_cluster.stages import TRAIN
    from dsno_cluster.training.ranks import launched_as_rank

    options = arguments.options
    if launched_as_rank() and not options.dry_run:  # torchrun or a similar launcher has set RANK
        if options.tasks_per_node or options.nodes:
            raise UserError(
                "--tasks-per-node and --nodes: RANK and WORLD_SIZE are set, so another launcher has started this process; "
                "unset them, or leave out the option"
            )
        TRAIN.run(config, TRAIN.options(), None, None)
        return
    run_stage(arguments, TRAIN, config, TRAIN.options())


def train_teacher(arguments: Arguments) -> None:
    config = arguments.config()
    if arguments.options.dry_run:
        settings = config.teacher_training
        data = config.data.name or config.data.images
        print(f"would train a teacher on {data} for {settings.steps} steps of batch {settings.batch_size}")
        return
    from dsno_cluster import console
    from dsno_cluster.training import train_teacher as training

    address = training.train_teacher(config, arguments.command_line)
    console.say(f"done: {address}; use it with teacher.path={address}")
