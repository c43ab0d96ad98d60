"""The training of the student, top to bottom: data, network, engine, steps, checkpoints."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
import torch.distributed as dist

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.diffusion.schedule import loss_weights
from dsno_cluster.diffusion.teachers import diffusers_model, warm_start_weights
from dsno_cluster.models.dsno import DSNO, Form
from dsno_cluster.storage import open_storage
from dsno_cluster.training import checkpoint
from dsno_cluster.training.engine import EMA, join_ranks, make_engine
from dsno_cluster.training.losses import make_distance, weighted
from dsno_cluster.training.optim import drawn_points, ema_decay_at, learning_rate
from dsno_cluster.trajectories.plan import make_plan, teacher_path
from dsno_cluster.trajectories.reader import open_trajectories, read_batches
from dsno_cluster.trajectories.shards import Manifest


def train(config: Config) -> str:
    """Train on this rank until `training.steps`; returns the address of the students.

    Continues by itself from the newest complete checkpoint. Raises UserError for input that cannot work and
    WorkError where training or its surroundings fail.
    """
    settings = config.training
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    address = f"{storage.url}/{checkpoint.student_prefix(config).rstrip('/')}"
    folder, manifest = find_trajectories(config)
    start = checkpoint.newest_step(config) or 0
    if start:
        checkpoint.check_same_run(config, start, checkpoint.run_identity(config, folder))
    if start >= settings.steps:
        console.say(f"finished already at step {start}: {address} (a new run needs another name=)")
        return address

    ranks = join_ranks(config)
    device, main = ranks.device, ranks.rank == 0
    torch.manual_seed(config.seed)
    student = new_student(config)
    if settings.compile:
        student.accelerate(compile=True)
    engine = make_engine(student, config, ranks)
    ema = EMA(student)
    if start:
        checkpoint.load(engine, ema, config, ranks, start)
    distance = make_distance(settings.loss, settings.lpips_weights, settings.lpips_sha256)
    if isinstance(distance, torch.nn.Module):
        distance.to(device)
    weights_M = loss_weights(settings.time_weighting, student.times).float().to(device)
    batches = read_batches(
        storage,
        folder,
        manifest,
        seed=config.seed,
        first_sample=start * settings.batch_size,
        batch_size=settings.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation=settings.accumulation,
        settings=config.reader,
    )

    if main:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters())
        console.say(
            f"student: {parameters / 1e6:.2f} M parameters, steps {start} to {settings.steps}, batch {settings.batch_size} "
            f"on {ranks.world_size} rank(s), ZeRO stage {settings.zero_stage}, {settings.precision}"
        )
        checkpoint.trim_metrics(config, start)
        checkpoint.metrics_file(config).parent.mkdir(parents=True, exist_ok=True)
    meta = checkpoint.student_meta(student, config, trajectories=folder, world_size=ranks.world_size)
    began, train_seconds = time.perf_counter(), _seconds_before(config, start) if main else 0.0
    with console.progress(
        "training the student", settings.steps, "steps", done=start, quiet=not main
    ) as advance:
        for step, micro_batches in zip(range(start, settings.steps), batches, strict=False):
            rate = learning_rate(
                step, settings.steps, settings.lr, settings.warmup, settings.lr_decay, settings.halve_at
            )
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            # dropout: its masks differ between ranks and do not depend on where a run was resumed
            torch.manual_seed(((config.seed << 20) + step) * 4096 % 2**63 + ranks.rank)
            distances_M = torch.zeros(len(weights_M), device=device)
            drawn = points_of_step(config, step)
            for batch in micro_batches:
                labels = None if batch.labels is None else batch.labels.to(device)
                predicted = engine(batch.noise.to(device), labels, drawn)
                distances = distance(predicted, batch.states[:, drawn].to(device))  # of the drawn points
                engine.backward(weighted(distances, weights_M[drawn]))
                engine.step()
                distances_M[drawn] += distances.detach() / settings.accumulation
            ema.update(ema_decay_at(step, settings.ema_decay, settings.ema_ramp))

            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps:
                dist.all_reduce(distances_M)
                distances_M /= ranks.world_size
                seconds = train_seconds + time.perf_counter() - began
                if main:
                    loss = float(weighted(distances_M[drawn], weights_M[drawn]))
                    known = [distances_M[i].item() if i in drawn else None for i in range(len(weights_M))]
                    _log(config, done, rate, loss, known, seconds)
            if main:
                advance(
                    1,
                    loss=float(weighted(distances_M[drawn], weights_M[drawn])),
                    **{"images/s": (done - start) * settings.batch_size / (time.perf_counter() - began)},
                )
            if done % settings.checkpoint_every == 0 or done == settings.steps:
                seconds = train_seconds + time.perf_counter() - began
                checkpoint.save(
                    engine, ema, config, ranks, done, {**meta, "train_seconds": round(seconds, 1)}
                )
    if main:
        console.say(f"done: {address}")
    return address


def find_trajectories(config: Config) -> tuple[str, Manifest]:
    """Folder and manifest of the config's finished trajectories. Raises UserError where there are none."""
    folder = make_plan(config).folder
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    return folder, open_trajectories(storage, folder, config.trajectories.num_samples)


def new_student(config: Config) -> DSNO:
    """A student at initialisation: the teacher's backbone where `student.warm_start`, new layers of time.

    Raises UserError where the teacher's shapes are not the config's, or it is no network that a student can start from.
    """
    settings, endpoint = config.student, config.storage.endpoint_url
    form = Form(settings.modes, settings.operator, settings.prediction, settings.points)
    path, options = teacher_path(config), config.teacher.options
    diffusers = diffusers_model(path, endpoint, **options) if settings.backbone == "diffusers" else None
    times, init = config.trajectories.time_points, settings.temporal_init
    student = DSNO(config.network, form, times, diffusers=diffusers, init=init)
    if settings.warm_start:
        student.warm_start(warm_start_weights(path, endpoint, **options))
    return student


def _seconds_before(config: Config, start: int) -> float:
    """Training seconds that a resumed run had used, from its last line of metrics."""
    file = checkpoint.metrics_file(config)
    lines = [json.loads(x) for x in file.read_text().splitlines()] if start and file.is_file() else []
    return max((x["seconds"] for x in lines if x["step"] <= start), default=0.0)


def points_of_step(config: Config, step: int) -> list[int]:
    """Which of the time points optimiser step `step` (0-based) sees, ascending: all, or those drawn for it."""
    points, settings = config.trajectories.num_points, config.training
    if config.student.points == "all":
        return list(range(points))
    return drawn_points(config.seed, step, points, settings.end_share, settings.most_points)


def _log(
    config: Config, step: int, rate: float, loss: float, distances: list[float | None], seconds: float
) -> None:
    line: dict[str, Any] = {"step": step, "loss": loss, "lr": rate, "seconds": round(seconds, 2)}
    line["distance_per_time"] = distances
    with checkpoint.metrics_file(config).open("a") as file:
        file.write(json.dumps(line) + "\n")
