"""The table of stages, from the teacher's trajectories to the evaluation of the student.

It has everything that differs between stages; commands, launchers and tasks read it. Heavy libraries are
imported inside the functions, so that importing the table is cheap.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsno_cluster import console
from dsno_cluster.cluster.stage import (
    Checked,
    RayOptions,
    SharedOptions,
    Stage,
    StageOptions,
    StageResult,
)
from dsno_cluster.errors import UserError
from dsno_cluster.files import shown_path

if TYPE_CHECKING:
    from dsno_cluster.config import Config
    from dsno_cluster.records import Record
    from dsno_cluster.teachers import ConfiguredTeacher


@dataclass(frozen=True)
class EvaluationOptions(RayOptions):
    """Options of eval: the student at `student`, the images at `samples`, or (`watch`) each checkpoint as it appears."""

    student: str | None = None
    samples: str | None = None
    watch: bool = False

    @property
    def subject(self) -> str:
        return "each checkpoint" if self.watch else self.samples or self.student or ""

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path in (self.student, self.samples) if path is not None)


def _check_generation(config: Config, options: SharedOptions, processes: int) -> Checked:
    from dsno_cluster.trajectories.generate import describe_plan
    from dsno_cluster.trajectories.plan import check_reachable, make_plan

    plan = make_plan(config)
    check_reachable(config, plan.folder)
    return Checked(f"would make {describe_plan(config, plan, options.crew(None))}", plan.teacher)


def _check_generation_ahead(config: Config, ranks: int) -> None:
    """Nothing to check ahead: this is the first stage, which is checked at once."""


def _generate(
    config: Config, options: SharedOptions, ray_address: str | None, teacher: ConfiguredTeacher | None
) -> StageResult:
    from dsno_cluster.trajectories.generate import generate
    from dsno_cluster.trajectories.plan import make_plan
    from dsno_cluster.trajectories.sharing import Share

    plan = make_plan(config, teacher)
    plan.teacher.forget()  # the actors load it
    share = Share(options.place, options.array) if options.array > 1 else None
    return StageResult(generate(config, plan, options.crew(ray_address), share), teacher=plan.teacher)


def _check_training(config: Config, options: StageOptions, processes: int) -> Checked:
    from dsno_cluster.training.beginning import check_begins, find_data_set, find_training_teacher
    from dsno_cluster.training.checkpoint import check_published, is_end, newest_step
    from dsno_cluster.training.ownership import check_students, students_claim
    from dsno_cluster.trajectories.plan import check_reachable

    _check_ranks(config, processes)
    teacher = find_training_teacher(config)
    data = find_data_set(config, teacher)
    check_begins(config, teacher)
    if config.training.online:  # it has not read the storage yet
        check_reachable(config, data.inputs.trajectories)
    newest = newest_step(config)
    check_published(config, data.inputs)
    check_students(students_claim(config), newest)
    begun = newest or 0
    if is_end(config, newest, data.inputs):
        done = f"nothing to do: {config.name} has already reached step {begun}; for a new training run choose another name="
        return Checked(done, teacher)
    read = f"{shown_path(config.storage.root)}/{data.inputs.trajectories}"
    learned = read if config.training.reads_trajectories else "samples of its own"
    would = (
        f"would train {config.name} for {config.training.steps} steps of batch {config.training.batch_size} on {learned} in "
        f"{processes} process(es) on this machine"
    )
    return Checked(would, teacher)


def _check_training_ahead(config: Config, ranks: int) -> None:
    from dsno_cluster.training.beginning import check_matched
    from dsno_cluster.training.checkpoint import newest_step
    from dsno_cluster.training.ownership import check_students, students_claim

    _check_ranks(config, ranks)
    check_students(students_claim(config), newest_step(config))
    check_matched(config)


def _check_ranks(config: Config, ranks: int) -> None:
    from dsno_cluster.training.objectives.losses import check_lpips_weights
    from dsno_cluster.training.ranks import check_divides

    check_divides(config, ranks)
    check_lpips_weights(config.training)


def _train(
    config: Config, options: StageOptions, ray_address: str | None, teacher: ConfiguredTeacher | None
) -> StageResult:
    from dsno_cluster.training.loop import train

    return StageResult(train(config, teacher), teacher=teacher)


def _check_evaluation(config: Config, options: EvaluationOptions, processes: int) -> Checked:
    from dsno_cluster.cluster.crew import actor_count

    settings = config.evaluation
    evaluated, teacher = _find_evaluated(config, options)
    return Checked(
        f"would evaluate {evaluated}, metrics {', '.join(settings.metrics)}, "
        f"{actor_count(options.crew(None), settings.threads)}",
        teacher,
    )


def _find_evaluated(config: Config, options: EvaluationOptions) -> tuple[str, ConfiguredTeacher | None]:
    """A description of what is evaluated, and its teacher. Raises UserError if it does not exist."""
    samples = config.evaluation.num_samples
    if options.samples is not None:
        from dsno_cluster.image_sets.opening import open_images

        images = open_images(options.samples, config.storage.endpoint_url, config.data)
        note = f" ({images.note})" if images.note else ""
        return f"{images.count} images of {images.address}{note}", None
    from dsno_cluster.evaluation.look_up import find_student
    from dsno_cluster.teachers import find_teacher

    if options.watch:
        return f"each checkpoint of {config.name} with {samples} samples", find_teacher(config)
    student = find_student(config, options.student)
    return f"{shown_path(student.address)} with {samples} samples", find_teacher(config)


def _check_evaluation_ahead(config: Config, ranks: int) -> None:
    from dsno_cluster.evaluation.look_up import check_comparison

    check_comparison(config)


def _evaluate(
    config: Config, options: EvaluationOptions, ray_address: str | None, teacher: ConfiguredTeacher | None
) -> StageResult:
    from dsno_cluster.evaluation.evaluate import evaluate, evaluate_images
    from dsno_cluster.evaluation.look_up import find_subject
    from dsno_cluster.evaluation.watch import watch
    from dsno_cluster.teachers import find_teacher

    found: Record
    crew = options.crew(ray_address)
    if options.watch:
        found = watch(config, teacher or find_teacher(config), crew)
    elif options.samples is not None:
        found = evaluate_images(config, options.samples, crew)
    else:
        found = evaluate(find_subject(config, options.student, teacher), crew)
    return StageResult(f"{config.storage.root.rstrip('/')}/evaluation/{config.name}", found, teacher)


GEN_TRAJECTORIES = Stage(
    name="gen-trajectories",
    purpose="the teacher solves its ODE, many evaluations an image",
    kind="ray",
    section="trajectories",
    options=SharedOptions,
    check=_check_generation,
    check_ahead=_check_generation_ahead,
    work=_generate,
)
TRAIN = Stage(
    name="train",
    purpose="the student learns to give the whole trajectory in one evaluation",
    kind="ranks",
    section="training",
    options=StageOptions,
    check=_check_training,
    check_ahead=_check_training_ahead,
    work=_train,
)
EVAL = Stage(
    name="eval",
    purpose="how close are one-step samples to real images and to the teacher's?",
    kind="ray",
    section="evaluation",
    options=EvaluationOptions,
    check=_check_evaluation,
    check_ahead=_check_evaluation_ahead,
    work=_evaluate,
)
STAGES: tuple[Stage[Any], ...] = (GEN_TRAJECTORIES, TRAIN, EVAL)


@dataclass(frozen=True)
class Part:
    """A part of the whole path: a stage of an experiment, and what it is for.

    `finishes`: whether it is one of the parts that finish the student.
    """

    stage: Stage[Any]
    config: Config
    purpose: str
    finishes: bool = False


def parts_of(config: Config) -> tuple[Part, ...]:
    """The parts of a config's whole path.

    Online training makes the trajectories itself, others were imported, and a student that exists may be finished without
    any. A student that is finished here is trained and evaluated once more, under its own name.
    """
    stages = STAGES if config.generates_trajectories else STAGES[1:]
    parts = [Part(stage, config, stage.purpose) for stage in stages]
    if (finished := config.finished) is not None:
        parts += [
            Part(
                TRAIN,
                finished,
                "the student is finished: its samples are to be as likely and as real as the teacher's",
                finishes=True,
            ),
            Part(EVAL, finished, "is it better than before, and than the teacher?", finishes=True),
        ]
    return tuple(parts)


def check_ahead(parts: Sequence[Part], ranks: Sequence[int]) -> None:
    """Raises UserError for what a part lacks, as far as that is known before the first one begins.

    `ranks` are the processes of each.
    """
    from dsno_cluster.config.finishing import in_terms_of_finish
    from dsno_cluster.training.beginning import check_begins

    for part, count in zip(parts, ranks, strict=True):
        try:
            part.stage.check_ahead(part.config, count)
        except UserError as error:
            if not part.finishes:
                raise
            raise UserError(in_terms_of_finish(str(error))) from None
        if part.stage is TRAIN and not part.finishes:  # the student to finish does not exist yet
            check_begins(part.config)


def describe_path(config: Config) -> str:
    """A description of the whole path, in one line."""
    made = ", made while training" if config.training.online else ""
    whose = "imported trajectories" if config.trajectories.imported else f"trajectories of the teacher{made}"
    read = f"{config.trajectories.num_samples} {whose}, " if config.needs_trajectories else ""
    finished = config.finished
    finishing = f", {finished.training.steps} finishing steps" if finished is not None else ""
    return (
        f"{read}{config.training.steps} training steps{finishing}, "
        f"{config.evaluation.num_samples} evaluated samples; results below {shown_path(config.storage.root)}"
    )


def run_path(config: Config, checked: Checked | None = None) -> StageResult:
    """Run the whole path in this process; returns the result of its last stage.

    Trajectories and training that are done are not done again; an evaluation measures the student again, and the teacher only
    where it was not measured.

    `checked` is the result of checking the first stage. The teacher is passed from stage to stage.
    """
    began = time.monotonic()
    console.say(f"the whole path: {describe_path(config)}")
    parts, teacher = parts_of(config), checked.found if checked else None
    for number, part in enumerate(parts, 1):
        stage = part.stage
        console.say(f"\n[{number}/{len(parts)}] {stage.name}: {part.purpose}")
        started = time.monotonic()
        result = stage.run(part.config, stage.options(), None, teacher)
        teacher = result.teacher
        console.say(f"{stage.name} took {console.duration(time.monotonic() - started)}")
    console.say(f"\nthe whole path took {time.monotonic() - began:.0f} s\n")
    return result
