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
from dsno_cluster.diffusion.teachers import warm_start_weights
from dsno_cluster.errors import UserError
from dsno_cluster.models.dsno import DSNO
from dsno_cluster.storage import open_storage
from dsno_cluster.training import checkpoint
from dsno_cluster.training.engine import EMA, join_ranks, make_engine
from dsno_cluster.training.losses import make_distance, weighted
from dsno_cluster.training.optim import ema_decay_at, learning_rate
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
    engine = make_engine(student, config, ranks)
    ema = EMA(student)
    if start:
        checkpoint.load(engine, ema, config, ranks, start)
    distance = make_distance(settings.loss, settings.lpips_weights, settings.lpips_sha256)
    if isinstance(distance, torch.nn.Module):
        distance.to(device)
    weights_M = loss_weights(settings.time_weighting, student.times).float().to(device)
    dtype = getattr(torch, settings.precision)
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
            for batch in micro_batches:
                labels = None if batch.labels is None else batch.labels.to(device)
                predicted = engine(batch.noise.to(device, dtype), labels)
                distances = distance(predicted.float(), batch.states.to(device))  # (M,)
                engine.backward(weighted(distances, weights_M))
                engine.step()
                distances_M += distances.detach() / settings.accumulation
            ema.update(ema_decay_at(step, settings.ema_decay, settings.ema_ramp))

            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps:
                dist.all_reduce(distances_M)
                distances_M /= ranks.world_size
                seconds = train_seconds + time.perf_counter() - began
                if main:
                    _log(
                        config,
                        done,
                        rate,
                        float(weighted(distances_M, weights_M)),
                        distances_M.tolist(),
                        seconds,
                    )
            if main:
                advance(
                    1,
                    loss=float(weighted(distances_M, weights_M)),
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
    """A student at initialisation: the teacher's backbone where `student.warm_start`, new temporal convolutions.

    What of the teacher a student can start from: `warm_start_weights`. Raises UserError where the teacher's shapes are
    not the config's, or it is no U-Net of ours.
    """
    student = DSNO(config.network, config.student.modes, config.trajectories.time_points)
    if not config.student.warm_start:
        return student
    endpoint = config.storage.endpoint_url
    teacher = warm_start_weights(teacher_path(config), endpoint, **config.teacher.options)
    own = student.backbone.state_dict()
    for name, tensor in teacher.items():
        if name not in own or own[name].shape != tensor.shape:
            found = "no such tensor" if name not in own else f"{tuple(own[name].shape)}"
            raise UserError(
                f"student.warm_start: the teacher has {name} {tuple(tensor.shape)}, the student of this config {found}; "
                "take over the teacher's network, or set student.warm_start=false"
            )
        own[name] = tensor
    student.backbone.load_state_dict(own)
    return student


def _seconds_before(config: Config, start: int) -> float:
    """Training seconds that a resumed run had used, from its last line of metrics."""
    file = checkpoint.metrics_file(config)
    lines = [json.loads(x) for x in file.read_text().splitlines()] if start and file.is_file() else []
    return max((x["seconds"] for x in lines if x["step"] <= start), default=0.0)


def _log(config: Config, step: int, rate: float, loss: float, distances: list[float], seconds: float) -> None:
    line: dict[str, Any] = {"step": step, "loss": loss, "lr": rate, "seconds": round(seconds, 2)}
    line["distance_per_time"] = distances
    with checkpoint.metrics_file(config).open("a") as file:
        file.write(json.dumps(line) + "\n")
