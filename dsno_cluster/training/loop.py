"""The training of the student, top to bottom: data, network, engine, steps, checkpoints."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.diffusion.schedule import loss_weights
from dsno_cluster.errors import LOST_RANK, UserError, WorkError
from dsno_cluster.model_folder import step_name
from dsno_cluster.storage import open_storage
from dsno_cluster.students.dsno import DSNO, Form
from dsno_cluster.teachers import find_teacher
from dsno_cluster.training import checkpoint
from dsno_cluster.training.engine import EMA, Ranks, join_ranks, make_engine
from dsno_cluster.training.losses import make_distance, weighted
from dsno_cluster.training.monitor import DivergenceWatch, HeldOut, Metrics, describe_batch, finite, memory_gb
from dsno_cluster.training.online import Producer, StagedShards, planned_manifest
from dsno_cluster.training.optim import drawn_points, learning_rate
from dsno_cluster.training.preemption import StopSignals, leave
from dsno_cluster.training.publish import Publisher
from dsno_cluster.training.state import fragments_of, loss_scaler_state
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.reader import Batch, ShardReader, open_trajectories, read_batches
from dsno_cluster.trajectories.shards import Manifest


def train(config: Config) -> str:
    """Train on this rank until `training.steps`; returns the address of the students.

    Continues by itself from the newest complete checkpoint, on any number of ranks and at any ZeRO stage. A signal ends
    it after its next step and a checkpoint: see `preemption.py`. Raises UserError for input that cannot work and WorkError
    where training or its surroundings fail.
    """
    settings = config.training
    shared = open_storage(config.storage.root, config.storage.endpoint_url)
    address = f"{shared.url}/{config.student_prefix.rstrip('/')}"
    folder, manifest = find_trajectories(config)
    with contextlib.ExitStack() as resources:
        resources.enter_context(_failures_in_a_line(config))
        stop = resources.enter_context(StopSignals())
        ranks = join_ranks(config)
        device, main = ranks.device, ranks.rank == 0
        if main:
            resources.enter_context(checkpoint.only_run(config))
            checkpoint.check_published(config, folder)
        start = _agreed_start(config, ranks)
        state = checkpoint.read_state(config, start, folder) if start else {}
        if start >= settings.steps:
            if main:
                Publisher(config).finish()
                checkpoint.check_finished_alike(config, start)
                console.say(f"finished already at step {start}: {address} (a new run needs another name=)")
            return address
        metrics = Metrics(config, start) if main else None
        torch.manual_seed(config.seed)
        student = new_student(config)
        saved = checkpoint.open_fragments(config, start) if start else None
        if saved is not None:
            saved.load_weights(student)
        measured = settings.heldout_every is not None or settings.picture_every is not None
        heldout = HeldOut(config, copy.deepcopy(student), manifest, device) if main and measured else None
        if settings.compile:
            student.accelerate(compile=True)
        engine = make_engine(student.recompute(settings.recompute), config, ranks)
        ema = EMA(fragments_of(engine), settings.ema_decays)
        if saved is not None:
            checkpoint.load(engine, ema, saved, state)
        distance = make_distance(settings.loss, settings.lpips_weights, settings.lpips_sha256)
        if isinstance(distance, torch.nn.Module):
            distance.to(device)
        weights_M = loss_weights(settings.time_weighting, student.times).float()
        weights_on_device_M = weights_M.to(device)
        batches = resources.enter_context(_batches(config, folder, manifest, ranks, start))

        if main:
            parameters = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters())
            console.say(
                f"student: {parameters / 1e6:.2f} M parameters, steps {start} to {settings.steps}, batch {settings.batch_size} "
                f"on {ranks.world_size} rank(s), ZeRO stage {engine.zero_optimization_stage()}, {settings.precision}"
            )
            reader = config.reader
            fetched = "://" in shared.url and not settings.online and reader.cache_dir is None
            # the shards of two windows stay open
            if fetched and ranks.world_size > 1 and len(manifest.shards) > 2 * reader.window_shards:
                console.say(
                    f"each of the {ranks.world_size} ranks fetches every shard in every epoch, as reader.cache_dir is null; "
                    "with one, such as reader.cache_dir='$TMPDIR/shards', a node fetches each once, if reader.cache_gb holds all"
                )
        meta = checkpoint.student_meta(student, config, folder, ranks.world_size)
        changed = checkpoint.changed_settings(config, state)
        if main:
            for change in changed:
                console.say("{key}: {before} until step {step}, {after} from here on".format(**change))
        if changes := [*state.get("changes", []), *changed]:
            meta["changes"] = changes
        record = checkpoint.Record(meta, state.get("seconds", 0.0), state.get("best"))
        publisher = Publisher(config) if main else None
        divergence = DivergenceWatch(settings.divergence_factor, len(weights_M))
        if state:
            divergence.load(state["divergence"])
        pace = Pace(record.seconds)
        with console.progress(
            "training the student", settings.steps, "steps", done=start, quiet=not main
        ) as advance:
            stop.steps_begin()
            for step in range(start, settings.steps):
                with pace.waiting():
                    micro_batches = next(batches)
                drawn = points_of_step(config, step)
                rate = learning_rate(
                    step, settings.steps, settings.lr, settings.warmup, settings.lr_decay, settings.halve_at
                )
                for group in engine.optimizer.param_groups:
                    group["lr"] = rate
                # dropout: its masks differ between ranks and do not depend on where a run was resumed
                torch.manual_seed(((config.seed << 20) + step) * 4096 % 2**63 + ranks.rank)
                distances_M = torch.zeros(len(weights_M), device=device)
                for batch in micro_batches:
                    labels = None if batch.labels is None else batch.labels.to(device)
                    predicted = engine(batch.noise.to(device), labels, drawn)
                    distances = distance(predicted.float(), batch.states[:, drawn].to(device))
                    engine.backward(weighted(distances, weights_on_device_M[drawn]))
                    engine.step()
                    distances_M[drawn] += distances.detach() / settings.accumulation
                ema.update(step, settings.ema_ramp)

                done = step + 1
                norm = engine.get_global_grad_norm()
                # overflows of float16 are its loss scaler's business: such a step is left out
                sound = settings.precision == "float16" or norm is None or math.isfinite(float(norm))
                seen, signals = _agree(distances_M, stop, ranks)
                known = [seen[i] if i in drawn else None for i in range(len(weights_M))]
                _check(config, done, known, sound, divergence, micro_batches, manifest, ranks)
                loss = float(weighted(torch.tensor(seen)[drawn], weights_M[drawn]))
                pace.step(settings.batch_size)
                record.seconds, record.divergence = pace.seconds, divergence.state()
                last = done == settings.steps or signals.any
                saving = done % settings.checkpoint_every == 0 or last
                picture_due = _due(settings.picture_every, done)
                error_due = _due(settings.heldout_every, done)
                error_due |= saving and settings.heldout_every is not None  # which tells the best checkpoint
                decays = settings.ema_decays if saving else settings.ema_decays[:1]
                students = {}  # gathered once, for what is measured and for the checkpoint
                if saving or error_due or picture_due:
                    students = {decay: ema.whole(engine.module, decay) for decay in decays}
                errors = None
                if heldout is not None and metrics is not None and (error_due or picture_due):
                    heldout.load(students[settings.ema_decays[0]])
                    errors = heldout.errors() if error_due else None
                    if picture_due:
                        metrics.picture(done, *heldout.picture())
                if metrics is not None and (done % settings.log_every == 0 or last or errors is not None):
                    line: dict[str, Any] = {"step": done, "loss": loss, "lr": rate}
                    line["seconds"] = round(record.seconds, 2)
                    line |= {"distance_per_time": known, **pace.figures(), "memory_gb": memory_gb(device)}
                    if settings.precision == "float16":
                        line["loss_scale"] = loss_scaler_state(engine)["cur_scale"]
                    if errors is not None:
                        line["heldout_error_per_time"] = errors
                    metrics.write(line)
                if main:
                    advance(1, loss=loss, **_shown(known, pace, device))
                if saving:
                    if errors is not None and (record.best is None or errors[-1] < record.best["error"]):
                        record.best = {"step": done, "error": errors[-1]}
                    checkpoint.save(engine, ema, config, ranks, done, record, students, publisher)
                if signals.any and done < settings.steps:
                    leave(ranks, done, preempted=not signals.interrupt)
        if publisher is not None:
            publisher.finish()
            console.say(f"done: {address}")
    return address


@contextlib.contextmanager
def _failures_in_a_line(config: Config) -> Iterator[None]:
    """WorkError in place of what torch raises where another rank no longer answers; UserError for too little device memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{' '.join(str(error).split())[:200]}; less of it is taken by training.accumulation, training.recompute, more "
            "ranks at training.zero_stage 2 or 3, or a smaller training.batch_size"
        ) from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        newest = checkpoint.newest_step(config)
        begin = f"the checkpoint of step {newest}" if newest else "the beginning"
        raise WorkError(f"{LOST_RANK} ({reason}); the same command goes on from {begin}") from error


@contextlib.contextmanager
def _batches(
    config: Config, folder: str, manifest: Manifest, ranks: Ranks, start: int
) -> Iterator[Iterator[list[Batch]]]:
    """This rank's micro-batches of each step from `start`: read from storage, or made while training."""
    settings = config.training
    shards: ShardReader
    producer = None
    if settings.online:
        producer = Producer(config, start) if ranks.rank == 0 else None
        dist.barrier()  # what stopped a former run is forgotten
        shards = StagedShards(config, folder, manifest, producer)
    else:
        storage = open_storage(config.storage.root, config.storage.endpoint_url)
        shards = ShardReader(storage, folder, manifest, config.reader)
    batches = read_batches(
        shards,
        seed=config.seed,
        first_sample=start * settings.batch_size,
        batch_size=settings.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation=settings.accumulation,
    )

    def told() -> Iterator[list[Batch]]:
        for step, micro_batches in zip(itertools.count(start), batches, strict=False):
            if producer is not None:
                producer.trained(step)
            yield micro_batches

    try:
        yield told()
    finally:
        if isinstance(shards, StagedShards):
            shards.stopped.set()
        batches.close()
        if producer is not None:
            producer.close()


def _agreed_start(config: Config, ranks: Ranks) -> int:
    """The step to go on from: what rank 0 sees, as folders may look older from other nodes."""
    newest = checkpoint.newest_step(config) or 0 if ranks.rank == 0 else 0
    start = torch.tensor([newest], device=ranks.device)
    dist.broadcast(start, 0)
    return int(start)


@dataclass(frozen=True)
class Signals:
    """Whether a signal reached any rank."""

    preempt: bool
    interrupt: bool

    @property
    def any(self) -> bool:
        return self.preempt or self.interrupt


def _agree(distances_M: Tensor, stop: StopSignals, ranks: Ranks) -> tuple[list[float], Signals]:
    """The distances of the whole global batch, and the signals of all ranks, in one all-reduce."""
    flags = torch.tensor([float(stop.preempt), float(stop.interrupt)], device=ranks.device)
    together = torch.cat([distances_M / ranks.world_size, flags])
    dist.all_reduce(together)
    *distances, preempt, interrupt = together.tolist()
    return distances, Signals(preempt > 0, interrupt > 0)


def _check(
    config: Config,
    step: int,
    distances: list[float | None],
    sound: bool,
    divergence: DivergenceWatch,
    batches: list[Batch],
    manifest: Manifest,
    ranks: Ranks,
) -> None:
    """WorkError on every rank where a step's loss is not finite or has diverged: nothing of it is saved."""
    problem = "the gradient is not finite" if not sound else divergence.problem(distances)
    if not finite(distances):
        problem = "the loss is not finite"
    if problem is None:
        return
    batch = describe_batch(batches, manifest, ranks)
    before = checkpoint.newest_step(config)
    good = (
        f"the last good checkpoint is that of step {before}, {checkpoint.resume_dir(config) / step_name(before)}"
        if before
        else "there is no checkpoint yet"
    )
    raise WorkError(f"step {step}: {problem}; the batch: {batch}; {good}")


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


class Pace:
    """Seconds of training so far, images a second, and the share of time in which the network waited for data."""

    def __init__(self, before: float) -> None:
        self.before, self.began = before, time.perf_counter()
        self.images, self.waited = 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def step(self, images: int) -> None:
        self.images += images

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def figures(self) -> dict[str, float]:
        spent = time.perf_counter() - self.began
        return {"images_per_second": self.images / spent, "data_wait": self.waited / spent}


def _shown(distances: list[float | None], pace: Pace, device: torch.device) -> dict[str, Any]:
    figures = pace.figures()
    by_time = " ".join("-" if x is None else f"{x:.3g}" for x in distances)
    return {
        "by time": by_time,
        "images/s": figures["images_per_second"],
        "data wait": f"{figures['data_wait']:.1%}",
        "GB": memory_gb(device),
    }


def find_trajectories(config: Config) -> tuple[str, Manifest]:
    """Folder and manifest of the config's finished trajectories, or of those that online training will make.

    Raises UserError where there are none.
    """
    plan = make_plan(config)
    if config.training.online:
        return plan.folder, planned_manifest(plan)
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    return plan.folder, open_trajectories(storage, plan.folder, config.trajectories.num_samples)


def new_student(config: Config) -> DSNO:
    """A student at initialisation: the teacher's backbone where `student.warm_start`, new layers of time.

    Raises UserError where the teacher's shapes are not the config's, or it is no network that a student can start from.
    """
    settings, teacher = config.student, find_teacher(config)
    form = Form(settings.modes, settings.operator, settings.prediction, settings.points)
    backbone = teacher.backbone()
    times, init = config.trajectories.time_points, settings.temporal_init
    diffusers = None if backbone is None else asdict(backbone)
    student = DSNO(config.network, form, times, diffusers=diffusers, init=init)
    if settings.warm_start:
        student.warm_start(teacher.warm_start())
    return student


def points_of_step(config: Config, step: int) -> list[int]:
    """Which of the time points optimiser step `step` (0-based) sees, ascending: all, or those drawn for it."""
    points, settings = config.trajectories.num_points, config.training
    if config.student.points == "all":
        return list(range(points))
    return drawn_points(config.seed, step, points, settings.end_share, settings.most_points)
