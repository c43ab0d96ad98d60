"""The training loop of the student: data, network, engine, steps, checkpoints."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import Config, Training
from dsno_cluster.errors import WorkError
from dsno_cluster.files import shown_path
from dsno_cluster.model_folder import step_name
from dsno_cluster.networks.recompute import recompute_in_backward
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import open_storage
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.teachers import ConfiguredTeacher
from dsno_cluster.training import checkpoint
from dsno_cluster.training.beginning import (
    Beginning,
    find_beginning,
    find_training_teacher,
    make_student,
    new_student,
)
from dsno_cluster.training.choices import accelerate, decide, decide_accumulation
from dsno_cluster.training.deepspeed_internals import fragments_of, loss_scaler_state, whole_shape
from dsno_cluster.training.divergence import DivergenceWatch, describe_batch
from dsno_cluster.training.engine import EMA, Engines, companion_prefix, make_engine
from dsno_cluster.training.failures import failures_in_a_line
from dsno_cluster.training.heldout import HeldOut, HeldOutFigures
from dsno_cluster.training.metrics_log import MetricsLine, MetricsLog
from dsno_cluster.training.objectives import Objective, StepFigures
from dsno_cluster.training.objectives.making import find_real_images, make_objective
from dsno_cluster.training.online import Producer, StagedShards
from dsno_cluster.training.optim import learning_rate
from dsno_cluster.training.ownership import only_run
from dsno_cluster.training.pace import Pace, memory_gb
from dsno_cluster.training.preemption import StopSignals, leave
from dsno_cluster.training.publish import Publisher
from dsno_cluster.training.ranks import (
    Ranks,
    barrier,
    broadcast_weights,
    from_rank_0,
    joined_ranks,
    on_every_rank,
    on_rank_0,
)
from dsno_cluster.training.readback import Readback, Signals, Taken
from dsno_cluster.training.real_images import RealImages
from dsno_cluster.trajectories.reader import Batch, ShardReader, blank_batch, read_batches
from dsno_cluster.trajectories.shards import Manifest


def train(config: Config, teacher: ConfiguredTeacher | None = None) -> str:
    """Train on this rank until `training.steps`; returns the address of the students.

    `teacher` is found unless it is given. Training continues from the newest complete checkpoint, on any
    number of ranks and at any ZeRO stage. A signal ends it after its next step, or update before the first
    one, and a checkpoint: see `preemption.py`. Raises UserError for input that cannot work and WorkError if
    training or its surroundings fail.
    """
    settings = config.training
    address = config.student_address
    with contextlib.ExitStack() as resources:
        resources.enter_context(failures_in_a_line(config))
        stop = resources.enter_context(StopSignals())
        ranks = resources.enter_context(joined_ranks(config))
        on_rank_0(ranks, lambda: resources.enter_context(only_run(checkpoint.resume_dir(config))))
        # only rank 0 ever reads it
        known = on_rank_0(ranks, lambda: teacher or find_training_teacher(config))
        beginning = from_rank_0(ranks, lambda: find_beginning(config, known))
        start, main = beginning.step, ranks.rank == 0
        if beginning.state is not None and beginning.state.is_end(settings.steps):
            if main:
                _finish_again(config, beginning, address)
            return address
        asked, config = config, decide(config, ranks, beginning.state)
        settings = config.training
        log = on_rank_0(ranks, lambda: resources.enter_context(MetricsLog(config, start)))
        student = _begin_student(config, beginning, known, ranks)
        real = on_every_rank(ranks, lambda: find_real_images(config, known, ranks.device, quiet=not main))
        heldout = on_rank_0(ranks, lambda: _held_out(config, known, student, beginning, real, ranks))
        objective = make_objective(config, known, real, ranks)
        if known is not None:
            known.forget()  # nothing below needs its weights
        student.recompute(settings.recompute)
        for companion in objective.companions.values():
            recompute_in_backward(companion.network, settings.recompute)
        config = decide_accumulation(config, ranks, beginning, student)
        settings = config.training
        accelerate(student, config, ranks)
        engines = _make_engines(student, objective, config, beginning, ranks)
        engine = engines.student
        ema = EMA(fragments_of(engine), settings.ema_decays)
        if beginning.state is not None:
            saved = checkpoint.open_fragments(config, start)
            checkpoint.load(engines, ema, objective.state, saved, beginning.state)
        batches = resources.enter_context(_batches(config, beginning, ranks))
        notes = checkpoint.begin_notes(student, config, beginning.inputs, ranks.world_size, beginning.state)
        if main:
            _say_beginning(config, beginning, engine, ranks, notes)
        if heldout is not None and notes.judge_by(heldout.basis):
            console.say(
                "the best checkpoint is sought anew: what checkpoints are judged by is measured of other samples, features or "
                "images than before"
            )
        publisher = Publisher(asked, beginning.inputs) if main else None
        divergence = DivergenceWatch(settings.divergence_factor, objective.figure_names, notes.divergence)
        pace, readback = Pace(notes.seconds), Readback(ranks)
        seen = objective.summary(
            [0.0] * len(objective.figure_names), start
        )  # until the first step has been read

        def judge(taken: Taken) -> StepFigures:
            figures = objective.summary(taken.figures, taken.step)
            _check_sound(config, taken, figures.watched, divergence, beginning.manifest, ranks)
            return figures

        stop.steps_begin()
        warmup, warmed = _warmup_updates(objective), beginning.warmed
        if start == 0 and warmed < len(warmup):
            with pace.waiting():
                first = next(batches)
            batches = itertools.chain([first], batches)  # step 0 is taken on them too
            made, signals = _warm_up(
                engines, objective, first, config, ranks, stop, warmup, warmed, beginning.manifest
            )
            if signals.any:
                notes.seconds, notes.warmed = pace.seconds, made
                # no student has been trained that could be published
                checkpoint.save(engines, ema, objective.state, config, ranks, 0, notes, {}, publisher)
                leave(ranks, f"update {made} before the first step", preempted=not signals.interrupt)
        with console.progress(
            "training the student",
            settings.steps,
            "steps",
            done=start,
            # attempts that begin at step 0 after more of the warm-up than the one before have made progress
            reached=start + (len(warmup) if start else warmed),
            quiet=not main,
        ) as advance:
            for step in range(start, settings.steps):
                with pace.waiting():
                    micro_batches = next(batches)
                figures = take_step(engines, objective, micro_batches, config, ranks, step)
                ema.update(step, settings.ema_ramp)
                readback.send(step, micro_batches, figures, engines.gradient_norm(), stop)

                done = step + 1
                last, signals = done == settings.steps, Signals()
                scheduled = _due_after(settings, done, last=last)
                for taken in readback.arrived(all=scheduled.anything):
                    seen, signals = judge(taken), signals | taken.signals
                if signals.any:  # what is saved must have been judged
                    for taken in readback.arrived(all=True):
                        seen, signals = judge(taken), signals | taken.signals
                pace.step(settings.batch_size)
                notes.seconds, notes.divergence = pace.seconds, divergence.normal()
                due = _due_after(settings, done, last=True) if signals.any else scheduled
                students = {decay: ema.whole(engine.module, decay) for decay in due.averages}
                measured = _measure(heldout, log, due, students, done)
                if log is not None and (due.line or measured.anything):
                    log.write(_line(engine, settings, done, seen, measured, pace, ranks))
                advance(1, _recorded(settings, done, seen, measured, pace), **_shown(seen, pace, ranks))
                if due.checkpoint:
                    if scheduled.checkpoint:  # and not because of a signal
                        notes.compare(done, measured.judged_by)
                    notes.ended = not last and from_rank_0(ranks, lambda: _is_stuck(settings, notes))
                    checkpoint.save(
                        engines, ema, objective.state, config, ranks, done, notes, students, publisher
                    )
                if notes.ended:
                    if main:
                        _say_ended(notes, done)
                    break
                if signals.any and not last:
                    leave(ranks, f"step {done}", preempted=not signals.interrupt)
        if publisher is not None:
            publisher.finish()
            console.say(f"done: {shown_path(address)}")
    return address


def _finish_again(config: Config, beginning: Beginning, address: str) -> None:
    """Do what is left for a run that is at its last step: upload students that were not uploaded yet."""
    Publisher(config, beginning.inputs).finish()
    checkpoint.check_finished_alike(config, beginning.step)
    console.say(
        f"finished already at step {beginning.step}: {shown_path(address)} (a new run needs another name=)"
    )


def _begin_student(
    config: Config, beginning: Beginning, teacher: ConfiguredTeacher | None, ranks: Ranks
) -> DSNO:
    """The student with the weights of the checkpoint, or those that it starts from; collective."""
    torch.manual_seed(config.training_seed)
    if beginning.state is not None:
        student = make_student(config, beginning.backbone)
        checkpoint.open_fragments(config, beginning.step).load_weights(student)
        return student
    made = on_rank_0(ranks, lambda: new_student(config, teacher, beginning.inputs.start))
    student = made or make_student(config, beginning.backbone)
    broadcast_weights(student, ranks)
    return student


def _held_out(
    config: Config,
    teacher: ConfiguredTeacher | None,
    student: DSNO,
    beginning: Beginning,
    real: RealImages | None,
    ranks: Ranks,
) -> HeldOut | None:
    if config.training.heldout_every is None and config.training.picture_every is None:
        return None
    return HeldOut(config, teacher, copy.deepcopy(student), beginning, real, ranks.device)


def _make_engines(
    student: DSNO, objective: Objective, config: Config, beginning: Beginning, ranks: Ranks
) -> Engines:
    """The engines of the student and of the objective's companions, these with the weights of the checkpoint; collective."""
    companions = {}
    for name, companion in objective.companions.items():
        if beginning.state is not None:
            saved = checkpoint.open_fragments(config, beginning.step)
            saved.load_weights(companion.network, companion_prefix(name))
        companions[name] = make_engine(companion.network, config, ranks)
    return Engines(make_engine(student, config, ranks), companions)


@contextlib.contextmanager
def _batches(config: Config, beginning: Beginning, ranks: Ranks) -> Iterator[Iterator[list[Batch]]]:
    """This rank's micro-batches of each step from the beginning's: read from storage, made while training, or blank ones."""
    settings, start, producer = config.training, beginning.step, None
    if not settings.reads_trajectories:
        size = settings.batch_size // (ranks.world_size * settings.micro_batches)
        yield itertools.repeat([blank_batch(size, config.network.state_shape)] * settings.micro_batches)
        return
    assert beginning.manifest is not None
    shards: ShardReader
    if settings.online:
        producer = Producer(config, start) if ranks.rank == 0 else None
        barrier(ranks)  # rank 0 has removed the note of what stopped an earlier run
        shards = StagedShards(config, beginning.inputs.trajectories, beginning.manifest, producer)
    else:
        storage = open_storage(config.storage.root, config.storage.endpoint_url)
        shards = ShardReader(storage, beginning.inputs.trajectories, beginning.manifest, config.reader)
    batches = read_batches(
        shards,
        seed=config.training_seed,
        first_sample=start * settings.batch_size,
        batch_size=settings.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation=settings.micro_batches,
    )

    def reported() -> Iterator[list[Batch]]:
        for step, micro_batches in zip(itertools.count(start), batches, strict=False):
            if producer is not None:
                producer.trained(step)
            yield micro_batches

    try:
        yield reported()
    finally:
        if isinstance(shards, StagedShards):
            shards.stopped.set()
        batches.close()
        if producer is not None:
            producer.close()


def _say_beginning(
    config: Config, beginning: Beginning, engine: Any, ranks: Ranks, notes: checkpoint.RunNotes
) -> None:
    settings, reader, manifest = config.training, config.reader, beginning.manifest
    parameters = sum(whole_shape(p).numel() for p in engine.module.parameters())
    console.say(
        f"student: {parameters / 1e6:.2f} M parameters, steps {beginning.step} to {settings.steps}, batch "
        f"{settings.batch_size} on {ranks.world_size} rank(s), ZeRO stage {engine.zero_optimization_stage()}, "
        f"{settings.precision}"
    )
    reads = settings.reads_trajectories and not settings.online
    fetched = "://" in config.storage.root and reads and reader.cache_dir is None
    # the shards of two windows stay open
    if fetched and ranks.world_size > 1 and manifest and len(manifest.shards) > 2 * reader.window_shards:
        console.say(
            f"each of the {ranks.world_size} ranks fetches every shard in every epoch, as reader.cache_dir is null; "
            "with one, such as reader.cache_dir='$TMPDIR/shards', a node fetches each once, if reader.cache_gb holds all"
        )
    for change in notes.about.changes or ():
        if change.step == beginning.step:
            console.say(
                f"{change.key}: {change.before} until step {change.step}, {change.after} from here on"
            )


def take_step(
    engines: Engines,
    objective: Objective,
    micro_batches: list[Batch],
    config: Config,
    ranks: Ranks,
    step: int,
) -> Tensor:
    """Optimiser step `step` (0-based) on this rank's micro-batches, after the updates of the objective's companions.

    Those of the warm-up have been made before step 0. Returns the mean of the figures, (F,).
    """
    settings, student = config.training, engines.student
    figures = torch.zeros(len(objective.figure_names), device=ranks.device)
    for name, companion in objective.companions.items():
        first = companion.warmup if step == 0 else 0
        for update in range(first, first + companion.updates):
            for seen in _update(engines, objective, name, micro_batches, config, ranks, step, update):
                figures += seen / (settings.micro_batches * companion.updates)
    _begin_update(student, _rate(settings, step), config, ranks, step, 0)
    for batch in micro_batches:
        loss, seen = objective.loss(student, batch, step)
        student.backward(loss)
        student.step()
        figures += seen / settings.micro_batches
    return figures


def _update(
    engines: Engines,
    objective: Objective,
    name: str,
    micro_batches: list[Batch],
    config: Config,
    ranks: Ranks,
    step: int,
    update: int,
) -> list[Tensor]:
    """Update `update` of a companion before step `step`; returns the figures of this rank's micro-batches, (F,) each."""
    settings, engine, companion = config.training, engines.companions[name], objective.companions[name]
    rate = learning_rate(step, settings.steps, companion.lr, settings.warmup, "none")
    _begin_update(engine, rate, config, ranks, step, update + 1)
    figures = []
    for batch in micro_batches:
        loss, seen = companion.loss(engines.student, engine, batch, step, update)
        engine.backward(loss)
        engine.step()
        figures.append(seen)
    return figures


def _warmup_updates(objective: Objective) -> list[tuple[str, int]]:
    """All updates of the warm-up, in their order: the companion's name and the number of the update."""
    return [
        (name, update)
        for name, companion in objective.companions.items()
        for update in range(companion.warmup)
    ]


def _warm_up(
    engines: Engines,
    objective: Objective,
    micro_batches: list[Batch],
    config: Config,
    ranks: Ranks,
    stop: StopSignals,
    updates: Sequence[tuple[str, int]],
    made: int,
    manifest: Manifest | None,
) -> tuple[int, Signals]:
    """Make the `updates` from number `made` on, until a signal reaches any rank; collective.

    Returns how many have been made then, and the signals. Raises WorkError, on every rank, for one that must not be saved.
    """
    readback, signals = Readback(ranks), Signals()
    # it only looks for figures that are not finite: the loss of a network that learns from nothing may jump
    divergence = DivergenceWatch(0.0, objective.figure_names)
    with console.progress(
        "before the first step", len(updates), "updates", done=made, quiet=ranks.rank != 0
    ) as advance:
        for name, update in updates[made:]:
            seen = _update(engines, objective, name, micro_batches, config, ranks, 0, update)
            norm = engines.companions[name].get_global_grad_norm()
            readback.send(0, micro_batches, torch.stack(seen).mean(dim=0), norm, stop)
            made += 1
            arrived = list(readback.arrived(all=made == len(updates)))
            if any(taken.signals.any for taken in arrived):  # what is saved must have been judged
                arrived += readback.arrived(all=True)
            shown: dict[str, float] = {}
            for taken in arrived:
                _check_sound(config, taken, taken.figures, divergence, manifest, ranks)
                signals |= taken.signals
                named = zip(objective.figure_names, taken.figures, strict=True)
                shown = {figure: value for figure, value in named if value}
            advance(1, **shown)
            if signals.any:
                break
    return made, signals


def _begin_update(engine: Any, rate: float, config: Config, ranks: Ranks, step: int, update: int) -> None:
    """Set the rate of an optimiser's step, and the seed of what its passes draw; the student's is update 0 of a step.

    What is drawn differs between ranks and does not depend on where a run was resumed.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(seed_of_draws(config, step, update, ranks.rank))


def seed_of_draws(config: Config, step: int, update: int, rank: int) -> int:
    """The seed of an update's draws. On a CPU torch looks at its last 32 bits only."""
    seed = config.training_seed
    if config.training.objective == "trajectories":  # for dropout, as ever since it has been there
        return ((seed << 20) + step) * 4096 % 2**63 + rank
    return int(canonical_hash({"seed": seed, "step": step, "update": update, "rank": rank})[:8], 16)


def _rate(settings: Training, step: int) -> float:
    """The student's learning rate at optimiser step `step`."""
    return learning_rate(
        step, settings.steps, settings.lr, settings.warmup, settings.lr_decay, settings.halve_at
    )


def _check_sound(
    config: Config,
    taken: Taken,
    watched: Sequence[float | None],
    divergence: DivergenceWatch,
    manifest: Manifest | None,
    ranks: Ranks,
) -> None:
    """Raises WorkError, on every rank, if a step must not be saved: its loss or gradient is not finite, or it has diverged."""
    # gradients of float16 that are not finite are handled by its loss scaler, which skips the step
    sound = config.training.precision == "float16" or taken.finite
    problem = divergence.problem(watched) or (None if sound else "the gradient is not finite")
    if problem is None:
        return
    batch, before = describe_batch(taken.batches, manifest, ranks), checkpoint.newest_step(config)
    good = (
        "there is no checkpoint yet"
        if before is None
        else f"the last good checkpoint is that of step {before}, {checkpoint.resume_dir(config) / step_name(before)}"
    )
    raise WorkError(f"step {taken.step + 1}: {problem}; the batch: {batch}; {good}")


@dataclass(frozen=True)
class Due:
    """What is due after a step; `averages` are the decays whose whole weights are needed for it."""

    line: bool
    errors: bool
    picture: bool
    checkpoint: bool
    averages: Sequence[float]

    @property
    def anything(self) -> bool:
        return self.line or self.errors or self.picture or self.checkpoint


def _due_after(settings: Training, done: int, *, last: bool) -> Due:
    saving = done % settings.checkpoint_every == 0 or last
    picture = settings.picture_every is not None and done % settings.picture_every == 0
    # also at each checkpoint: the errors decide which one is the best
    errors = settings.heldout_every is not None and (saving or done % settings.heldout_every == 0)
    # gathered once, for the measurement and the checkpoint
    measured = settings.ema_decays[:1] if errors or picture else ()
    averages = settings.ema_decays if saving else measured
    return Due(done % settings.log_every == 0 or last, errors, picture, saving, averages)


def _measure(
    heldout: HeldOut | None,
    log: MetricsLog | None,
    due: Due,
    students: dict[float, dict[str, Tensor]],
    done: int,
) -> HeldOutFigures:
    """The held-out figures, if they are due; a picture, if one is due, goes to the log."""
    if heldout is None or log is None or not (due.errors or due.picture):
        return HeldOutFigures()
    heldout.load(students[due.averages[0]])
    measured = heldout.figures() if due.errors else HeldOutFigures()
    if due.picture:
        log.picture(done, *heldout.picture())
    return measured


def _is_stuck(settings: Training, notes: checkpoint.RunNotes) -> bool:
    """Whether the held-out figure has not improved for so many checkpoints that training ends."""
    patience = settings.distribution.patience if settings.objective == "distribution" else None
    return patience is not None and notes.without_progress >= patience


def _say_ended(notes: checkpoint.RunNotes, done: int) -> None:
    assert notes.best is not None
    console.say(
        f"ended at step {done}: none of the last {notes.without_progress} checkpoints has a smaller distance than that of step "
        f"{notes.best.step}, {notes.best.figure:.3g} (training.distribution.patience)"
    )


def _line(
    engine: Any,
    settings: Training,
    done: int,
    seen: StepFigures,
    measured: HeldOutFigures,
    pace: Pace,
    ranks: Ranks,
) -> MetricsLine:
    return MetricsLine(
        step=done,
        loss=seen.loss,
        lr=_rate(settings, done - 1),
        seconds=round(pace.seconds, 2),
        distance_per_time=seen.distance_per_time,
        images_per_second=pace.images_per_second,
        data_wait=pace.data_wait,
        memory_gb=memory_gb(ranks.device),
        loss_scale=loss_scaler_state(engine).get("cur_scale"),
        heldout_error_per_time=measured.errors,
        heldout_distance=measured.distance,
        figures=dict(seen.others) or None,
    )


def _recorded(
    settings: Training, done: int, seen: StepFigures, measured: HeldOutFigures, pace: Pace
) -> dict[str, console.Figure]:
    """The figures that are recorded with the progress, by their names in metrics.jsonl: those that are known."""
    figures: dict[str, console.Figure | None] = {
        "loss": seen.loss,
        "lr": _rate(settings, done - 1),
        "images_per_second": pace.images_per_second,
        "seconds": pace.seconds,
        "heldout_error_per_time": measured.errors,
        "heldout_distance": measured.distance,
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _by_time(seen: StepFigures) -> dict[str, str]:
    distances = ["-" if x is None else f"{x:.3g}" for x in seen.distance_per_time]
    return {"by time": " ".join(distances)} if distances else {}


def _shown(seen: StepFigures, pace: Pace, ranks: Ranks) -> dict[str, float | str]:
    """The figures that the progress line shows."""
    return {
        "loss": seen.loss,
        **seen.others,
        **_by_time(seen),
        "images/s": pace.images_per_second,
        "data wait": f"{pace.data_wait:.1%}",
        "GB": memory_gb(ranks.device),
    }
