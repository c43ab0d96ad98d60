"""The stages of the path, from the teacher's trajectories to the evaluation of the student, as one table.

Everything that differs between stages stands here; commands, launchers and tasks read it. Heavy libraries are imported
inside the functions, so that the table itself is light.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsno_cluster.cluster.stage import Stage, StageOptions, StageResult

if TYPE_CHECKING:
    from dsno_cluster.config import Config


@dataclass(frozen=True)
class GenerationOptions(StageOptions):
    """`actors`: how many Ray actors; None for as many as there is room for."""

    actors: int | None = None


@dataclass(frozen=True)
class EvaluationOptions(StageOptions):
    """What is evaluated: the student at `student`, the images at `samples`, or (`watch`) each checkpoint as it appears."""

    actors: int | None = None
    student: str | None = None
    samples: str | None = None
    watch: bool = False

    @property
    def subject(self) -> str:
        return "each checkpoint" if self.watch else self.samples or self.student or ""


def _check_generation(config: Config, options: GenerationOptions, processes: int) -> str:
    from dsno_cluster.trajectories.generate import describe_plan
    from dsno_cluster.trajectories.plan import check_reachable, make_plan

    plan = make_plan(config)
    check_reachable(config, plan.folder)
    return f"would make {describe_plan(config, plan, options.actors)}"


def _check_generation_ahead(config: Config, ranks: int) -> None:
    """It is the first stage: all of it is checked at once."""


def _generate(config: Config, options: GenerationOptions, ray_address: str | None) -> StageResult:
    from dsno_cluster.trajectories.generate import generate

    return StageResult(generate(config, options.actors, ray_address))


def _check_training(config: Config, options: StageOptions, processes: int) -> str:
    from dsno_cluster.training.checkpoint import newest_step
    from dsno_cluster.training.loop import find_trajectories
    from dsno_cluster.trajectories.plan import check_reachable

    _check_training_ahead(config, processes)
    folder, _ = find_trajectories(config)
    if config.training.online:  # which reads nothing before it begins
        check_reachable(config, folder)
    begun = newest_step(config) or 0
    if begun >= config.training.steps:
        return f"nothing to do: {config.name} is at step {begun} already; a new run needs another name="
    return (
        f"would train {config.name} for {config.training.steps} steps of batch {config.training.batch_size} on "
        f"{config.storage.root}/{folder} in {processes} process(es) on this machine"
    )


def _check_training_ahead(config: Config, ranks: int) -> None:
    from dsno_cluster.training.engine import check_divides
    from dsno_cluster.training.losses import find_lpips_weights

    check_divides(config, ranks)
    find_lpips_weights(config.training)


def _train(config: Config, options: StageOptions, ray_address: str | None) -> StageResult:
    from dsno_cluster.training.loop import train

    return StageResult(train(config))


def _check_evaluation(config: Config, options: EvaluationOptions, processes: int) -> str:
    from dsno_cluster.cluster.ray_pool import actor_count

    settings = config.evaluation
    return (
        f"would evaluate {_find_evaluated(config, options)}, metrics {', '.join(settings.metrics)}, "
        f"{actor_count(options.actors, settings.threads)}"
    )


def _find_evaluated(config: Config, options: EvaluationOptions) -> str:
    """What is evaluated, in words. Raises UserError if it does not exist."""
    samples = config.evaluation.num_samples
    if options.watch:
        from dsno_cluster.trajectories.plan import find_teacher

        find_teacher(config)
        return f"each checkpoint of {config.name} with {samples} samples"
    if options.samples is not None:
        from dsno_cluster.evaluation.image_sets import open_images

        images = open_images(options.samples, config.storage.endpoint_url)
        return f"{images.count} images of {images.address}"
    from dsno_cluster.evaluation.evaluate import find_student

    path, _ = find_student(config, options.student)
    return f"{path} with {samples} samples"


def _check_evaluation_ahead(config: Config, ranks: int) -> None:
    from dsno_cluster.evaluation.evaluate import check_comparison

    check_comparison(config)


def _evaluate(config: Config, options: EvaluationOptions, ray_address: str | None) -> StageResult:
    from dsno_cluster.evaluation.evaluate import evaluate, evaluate_images
    from dsno_cluster.evaluation.watch import watch

    if options.watch:
        found = watch(config, options.actors, ray_address)
    elif options.samples is not None:
        found = evaluate_images(config, options.samples, options.actors, ray_address)
    else:
        found = evaluate(config, options.student, options.actors, ray_address)
    return StageResult(f"{config.storage.root}/evaluation/{config.name}", found)


GEN_TRAJECTORIES = Stage(
    name="gen-trajectories",
    purpose="the teacher solves its ODE, many evaluations an image",
    kind="ray",
    section="trajectories",
    options=GenerationOptions,
    check=_check_generation,
    check_ahead=_check_generation_ahead,
    run=_generate,
)
TRAIN = Stage(
    name="train",
    purpose="the student learns to give the whole trajectory in one evaluation",
    kind="ranks",
    section="training",
    options=StageOptions,
    check=_check_training,
    check_ahead=_check_training_ahead,
    run=_train,
)
EVAL = Stage(
    name="eval",
    purpose="how close do one-step samples come?",
    kind="ray",
    section="evaluation",
    options=EvaluationOptions,
    check=_check_evaluation,
    check_ahead=_check_evaluation_ahead,
    run=_evaluate,
)
STAGES: tuple[Stage[Any], ...] = (GEN_TRAJECTORIES, TRAIN, EVAL)


def stages_of(config: Config) -> tuple[Stage[Any], ...]:
    """The stages of a config's whole path: online training makes the trajectories itself."""
    return STAGES[1:] if config.training.online else STAGES


def describe_path(config: Config) -> str:
    """What the whole path will do, in one line."""
    made = ", made while training" if config.training.online else ""
    return (
        f"{config.trajectories.num_samples} trajectories of the teacher{made}, {config.training.steps} training steps, "
        f"{config.evaluation.num_samples} evaluated samples; results below {config.storage.root}"
    )


def run_path(config: Config) -> StageResult:
    """Run the whole path in this process; returns the result of its last stage. Finished stages are not done again."""
    from dsno_cluster import console

    began = time.monotonic()
    console.say(f"the whole path: {describe_path(config)}")
    stages = stages_of(config)
    for number, stage in enumerate(stages, 1):
        console.say(f"\n[{number}/{len(stages)}] {stage.name}: {stage.purpose}")
        result = stage.run(config, stage.options(), None)
    console.say(f"\nthe whole path took {time.monotonic() - began:.0f} s\n")
    return result
