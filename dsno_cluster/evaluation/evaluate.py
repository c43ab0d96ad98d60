"""eval, in three steps: look up, measure, store.

Ray actors draw or read images and extract features; the driver merges and compares. Every figure is a
function of checkpoint, seeds, counts and weights.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import torch

from dsno_cluster import console
from dsno_cluster.cluster.crew import ANY_CREW, Crew, actor_count
from dsno_cluster.config import Config
from dsno_cluster.evaluation.look_up import (
    Comparison,
    ImagesComparison,
    Subject,
    look_up,
    look_up_images,
    say_what,
)
from dsno_cluster.evaluation.measure import MeasuredSet, MeasuredStudent, Surroundings, measure
from dsno_cluster.evaluation.records import Figures, HeldOut, ImagesMetrics, Metrics, TeacherRow
from dsno_cluster.evaluation.sources import HELD_OUT, STUDENT
from dsno_cluster.evaluation.store import Findings, say_replaced, store, store_images
from dsno_cluster.evaluation.student_before import find_before
from dsno_cluster.evaluation.teacher_rows import keep_row
from dsno_cluster.image_sets.opening import open_images
from dsno_cluster.trajectories.generate import kernels_folder, say_compiling


def evaluate(
    subject: Subject,
    crew: Crew = ANY_CREW,
    folder: str | None = None,
) -> Metrics:
    """Evaluate a student (see `find_subject`) and its teacher against the real data; returns the metrics.

    The work is done by the Ray actors of `crew`. Writes metrics.json and the pictures below `folder` of the storage
    (default: `evaluation/<name>/`). Raises UserError without weights or reference, and as `measure` does.
    """
    began = time.monotonic()
    subject = replace(subject, config=decided(subject.config))
    comparison = look_up(subject, folder)
    say_what(comparison, crew)
    replaced, before = say_replaced(comparison), find_before(comparison)
    found = _measure(comparison, crew)
    return store(comparison, found, began, replaced, before)


def decided(config: Config) -> Config:
    """The config with its `evaluation.compile` decided by whether this process sees a GPU."""
    settings = config.evaluation
    if settings.compile == "auto":
        settings = settings.model_copy(update={"compile": torch.cuda.is_available()})
    if settings.compile:
        console.say(
            f"the student's network is compiled, with kernels kept in {kernels_folder(config)}: the first images take longer, "
            "up to some minutes"
        )
    return config.model_copy(update={"evaluation": settings})


def evaluate_images(config: Config, address: str, crew: Crew = ANY_CREW) -> ImagesMetrics:
    """Measure the images at `address` (see `image_sets.opening`) by the config's metrics, without sampling.

    Writes `<storage.root>/evaluation/<name>/samples-<hash of the images>.json`; returns its content. Raises UserError
    without images, weights or reference.
    """
    comparison = look_up_images(
        config, open_images(address, config.storage.endpoint_url, config.data), address
    )
    real, weights = comparison.real, comparison.weights
    console.say(
        f"{comparison.images.count} images of {address} against {real.count or 'the'} real images by {', '.join(weights)}, "
        f"{actor_count(crew, config.evaluation.threads)}"
    )
    for images in (comparison.images, real.images):
        if images is not None:
            images.say_note()
    figures, surroundings = _measure_images(comparison, crew)
    return store_images(comparison, figures, surroundings)


def _measure(comparison: Comparison, crew: Crew) -> Findings:
    """Measure what is missing.

    The teacher's rows are stored at once, and the images of those that are unfinished are kept, so that a restarted
    evaluation has them.
    """
    config, kept_rows = comparison.config, comparison.kept_rows
    kept_rows.drop(comparison.known)  # left by a run that stopped before it dropped them
    kept = kept_rows.count(comparison.missing)
    if kept:
        console.say(
            f"up to {kept:,} of the teacher's samples are kept from an evaluation that did not finish their rows"
        )
    rows, of_student = dict(comparison.known), Figures()
    student: MeasuredStudent | None = None
    held_out: HeldOut | None = None
    surroundings: Surroundings | None = None
    say_compiling(config, kept_rows.spec)
    measuring = measure(
        config,
        comparison.weights,
        comparison.sets(),
        comparison.real,
        student=comparison.at_work,
        crew=crew,
        title=f"evaluating {comparison.subject.student.title}",
        reached=len(comparison.known) * config.evaluation.drawn + kept,
    )
    with contextlib.closing(measuring):
        for part in measuring:
            match part:
                case MeasuredStudent():
                    student = part
                case Surroundings():
                    surroundings = part
                case MeasuredSet(images, figures) if images.source == STUDENT:
                    of_student = figures
                case MeasuredSet(images, figures) if images.source == HELD_OUT:
                    held_out = HeldOut.model_validate({"num_samples": images.count, **figures.values()})
                case MeasuredSet(images, figures):
                    sampling = images.source.sampling
                    assert sampling is not None
                    row = {"source": images.source.title, "evaluations": sampling.evaluations}
                    rows[sampling] = TeacherRow.model_validate({**row, **figures.values()})
                    keep_row(comparison.storage, comparison.spec, sampling, rows[sampling])
                    kept_rows.drop([sampling])
    kept_rows.drop(comparison.samplings)  # what an actor kept of a block that another one had finished
    assert student is not None and surroundings is not None
    return Findings(rows, student, of_student, held_out, surroundings)


def _measure_images(comparison: ImagesComparison, crew: Crew) -> tuple[Figures, Surroundings]:
    figures: Figures | None = None
    surroundings: Surroundings | None = None
    measuring = measure(
        comparison.config,
        comparison.weights,
        comparison.sets(),
        comparison.real,
        crew=crew,
    )
    with contextlib.closing(measuring):
        for part in measuring:
            match part:
                case MeasuredSet() if part.images.source == comparison.source:
                    figures = part.figures
                case Surroundings():
                    surroundings = part
    assert figures is not None and surroundings is not None
    return figures, surroundings
