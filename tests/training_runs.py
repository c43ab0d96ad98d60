"""Runs of the tiny training that several test files make: in one process, in several, killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from tiny import TINY, dsno

STUDENT = "students/digits"


def link_data(data: Path, out: Path) -> Path:
    """A storage root `out` with the trajectories of `data`."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "trajectories").exists():
        (out / "trajectories").symlink_to(data / "trajectories")
    return out


def words(out: Path, *more: str) -> list[str]:
    return ["train", *TINY, f"storage.root={out}", "training.threads=1", *more]


def train(data: Path, out: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Train the tiny experiment on `data`, writing below `out`."""
    link_data(data, out)
    done = dsno(*words(out, *more), "--launcher", "local", **env)
    assert done.returncode == 0, done.stderr
    return done


def start_ranks(out: Path, count: int, *more: str, script: str = "") -> list[subprocess.Popen[str]]:
    """Several ranks as a launcher such as torchrun starts them; `script` is run in place of the command line's module."""
    from dsno_cluster.cluster.rendezvous import free_ports

    port = str(free_ports(1)[0])
    ranks = []
    for rank in range(count):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen(
                [
                    sys.executable,
                    *(["-c", script] if script else ["-m", "dsno_cluster.cli"]),
                    *words(out, *more),
                ],
                env={**os.environ, **variables, **where},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return ranks


def ends(ranks: Sequence[subprocess.Popen[str]], timeout: float = 200) -> tuple[list[int], list[str]]:
    """Exit statuses and standard errors of ranks."""
    errors = [process.communicate(timeout=timeout)[1] for process in ranks]
    return [process.returncode for process in ranks], errors


def wait_for(what: Callable[[], bool], seconds: float = 120, pause: float = 0.005) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)


def weights(out: Path, step: int = 4, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / STUDENT / f"step-{step:09d}" / file)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / STUDENT / "metrics.jsonl").read_text().splitlines()]


def checkpoints(out: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (out / STUDENT / "resume").glob("step-*"))
