"""Checkpoints of training: DeepSpeed's own state to resume from, and the averaged student that others load.

Resume state lies below `<run.dir>/students/<name>/resume/`, one folder a step; a folder that can be seen is
complete. Students lie below `<storage.root>/students/<name>/step-000001000/`, named by the text file `latest`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist

from dsno_cluster.config import Config, dump_config
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.models.dsno import DSNO
from dsno_cluster.models.weights import LATEST, write_model
from dsno_cluster.storage import FolderStorage, open_storage, sync
from dsno_cluster.training.engine import EMA, Ranks

KEEP = 2
STATE = "state.json"


def step_name(step: int) -> str:
    return f"step-{step:09d}"


def student_prefix(config: Config) -> str:
    return f"students/{config.name}/"


def resume_dir(config: Config) -> Path:
    return config.run_dir / student_prefix(config) / "resume"


def newest_step(config: Config) -> int | None:
    """The step of the newest complete resume state, or None."""
    folder = resume_dir(config)
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    steps = [int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d+)", name))]
    return max(steps, default=None)


def save(engine: Any, ema: EMA, config: Config, ranks: Ranks, step: int, meta: dict[str, Any]) -> None:
    """Save resume state and publish the averaged student; collective: every rank must call it.

    Written aside, then renamed by rank 0 once all ranks have written.
    """
    folder = resume_dir(config)
    aside = f".{step_name(step)}.tmp"
    if ranks.rank == 0:
        shutil.rmtree(folder / aside, ignore_errors=True)
        (folder / aside).mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=aside, save_latest=False, exclude_frozen_parameters=False)
    safetensors.torch.save_file(ema.averages, folder / aside / f"ema-rank{ranks.rank:05d}.safetensors")
    weights = ema.gathered()
    dist.barrier()
    if ranks.rank == 0:
        # before the state can be seen: a run that is finished has its student
        _publish(config, weights, step, meta)
        identity = run_identity(config, meta["trajectories"]) | _layout(config, ranks)
        (folder / aside / STATE).write_text(json.dumps(identity))
        for file in (folder / aside).iterdir():
            sync(file)
        final = folder / step_name(step)
        shutil.rmtree(final, ignore_errors=True)
        (folder / aside).rename(final)
        sync(folder)
        for old in sorted(folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def check_same_run(config: Config, step: int, identity: dict[str, Any]) -> None:
    """Raises UserError unless the resume state of `step` agrees with every item of `identity`."""
    folder = resume_dir(config) / step_name(step)
    saved = json.loads((folder / STATE).read_text())
    for key, value in identity.items():
        if saved.get(key) != value:
            raise UserError(
                f"{folder}: was saved with {key} {saved.get(key)}, now it is {value}; "
                "go back to that, or start a new run with name=..."
            )


def load(engine: Any, ema: EMA, config: Config, ranks: Ranks, step: int) -> None:
    """Take up the resume state of `step`. Raises UserError where other ranks or another stage saved it."""
    check_same_run(config, step, _layout(config, ranks))
    folder = resume_dir(config) / step_name(step)
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise WorkError(f"{folder}: DeepSpeed found no state to load")
    ema.load(safetensors.torch.load_file(folder / f"ema-rank{ranks.rank:05d}.safetensors"))


def _publish(config: Config, weights: dict[str, Any], step: int, meta: dict[str, Any]) -> None:
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    prefix = student_prefix(config)
    write_model(storage, f"{prefix}{step_name(step)}/", weights, dump_config(config), {**meta, "step": step})
    storage.write(prefix + LATEST, (step_name(step) + "\n").encode())


def run_identity(config: Config, trajectories: str) -> dict[str, Any]:
    """What makes it another run, whose checkpoints must not be continued, if it differs."""
    drawn = [config.training.end_share, config.training.most_points]
    return {
        "network": config.network.model_dump(mode="json"),
        "student": config.student.model_dump(mode="json"),
        "trajectories": trajectories,
        "num_samples": config.trajectories.num_samples,
        "seed": config.seed,
        "batch_size": config.training.batch_size,
        "order": [config.reader.shuffle, config.reader.window_shards],
        "loss": config.training.loss,
        "time_weighting": config.training.time_weighting,
        "drawn": drawn if config.student.points == "drawn" else None,
    }


def _layout(config: Config, ranks: Ranks) -> dict[str, Any]:
    """How DeepSpeed's files are cut."""
    return {"zero_stage": config.training.zero_stage, "world_size": ranks.world_size}


def metrics_file(config: Config) -> Path:
    return config.run_dir / student_prefix(config) / "metrics.jsonl"


def trim_metrics(config: Config, step: int) -> None:
    """Drop lines of steps after `step`, which a resumed run will write again."""
    file = metrics_file(config)
    if file.is_file():
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        FolderStorage(file.parent).write(file.name, "".join(line + "\n" for line in kept).encode())


def student_meta(student: DSNO, config: Config, **more: Any) -> dict[str, Any]:
    """What `meta.json` says of a student, but for the step, the weights' hash and the versions."""
    return {
        "model": student.describe(),
        "name": config.name,
        "seed": config.seed,
        "ema_decay": config.training.ema_decay,
        **more,
    }
