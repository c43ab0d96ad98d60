"""The commands that train: train, train-teacher."""

from __future__ import annotations

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.commands.launching import launcher_and_profile, scripts_anyway, submit_stage
from dsno_cluster.files import shown_path


def train_student(arguments: Arguments) -> None:
    config = arguments.config()
    from dsno_cluster.training.beginning import find_trajectories
    from dsno_cluster.training.objectives.losses import find_lpips_weights
    from dsno_cluster.training.ranks import check_divides, launched_as_rank

    if launched_as_rank() and not arguments.options.dry_run:  # by torchrun or the like, which sets RANK
        from dsno_cluster.training.loop import train

        train(config)
        return
    tasks = arguments.options.tasks_per_node or 1
    check_divides(config, tasks)
    with scripts_anyway(arguments, config, ["train"]):
        find_lpips_weights(config.training)
        # what is missing is said before anything starts or is submitted
        folder, _ = find_trajectories(config)
    launcher, profile = launcher_and_profile(arguments, "train")
    if launcher == "slurm":
        check_divides(config, profile.nodes * profile.tasks_per_node)
        submit_stage(arguments, config, profile, "train")
        return
    if arguments.options.dry_run:
        from dsno_cluster.training.checkpoint import newest_step

        begun = newest_step(config) or 0
        if begun >= config.training.steps:
            print(f"nothing to do: {config.name} is at step {begun} already; a new run needs another name=")
            return
        print(
            f"would train {config.name} for {config.training.steps} steps of batch {config.training.batch_size} on "
            f"{shown_path(config.storage.root)}/{folder} in {tasks} process(es) on this machine"
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


def train_teacher(arguments: Arguments) -> None:
    config = arguments.config()
    if arguments.options.dry_run:
        settings = config.teacher_training
        print(
            f"would train a teacher on {config.data.name} for {settings.steps} steps of batch {settings.batch_size}"
        )
        return
    from dsno_cluster import console
    from dsno_cluster.training import train_teacher as training

    address = training.train_teacher(config, arguments.command_line)
    console.say(f"done: {address}; use it with teacher.path={address}")
