"""What the training engine costs and holds: against a plain loop, against the published recipe, and per rank by ZeRO stage.

    python benchmarks/training.py overhead [key=value ...]     one process: steps through DeepSpeed and in a plain loop, in turn
    python benchmarks/training.py recipe --published DIR       two processes: ours, and the published network in torch's DDP
    python benchmarks/training.py memory                       the CIFAR-10 network on four processes, stages 0 to 3
                                                               (on a machine with GPUs, on one process a GPU, at most as many)
    python benchmarks/training.py wait                         the share of a training in which it waited for data

Steps of the two sides are taken in turn in the same processes, so that a ratio is of neighbours in time. The plain loop has
what the engine has: Adam and a moving average. The published recipe is its network in DistributedDataParallel with Adam, its
weights snr and its absolute difference, without an average. Nothing else may run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from sampler import published_network, status
from torch import Tensor, nn

from dsno_cluster import console
from dsno_cluster.cluster.rendezvous import free_ports
from dsno_cluster.config import Config, load_config
from dsno_cluster.device import compute_device, device_name, visible_gpus, wait_for_gpu
from dsno_cluster.diffusion.schedule import logsnr, loss_weights, time_points
from dsno_cluster.students.dsno import DSNO, Form
from dsno_cluster.torch_internals import lerp_all
from dsno_cluster.training.beginning import new_student
from dsno_cluster.training.deepspeed_internals import fragments_of
from dsno_cluster.training.engine import EMA, make_engine
from dsno_cluster.training.objectives.losses import l1, weighted
from dsno_cluster.training.objectives.trajectories import TrajectoryObjective
from dsno_cluster.training.ranks import join_ranks
from dsno_cluster.trajectories.reader import Batch

Step = Callable[[], Any]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "part", nargs="?", choices=("overhead", "recipe", "memory", "wait"), default="overhead"
    )
    parser.add_argument("--config", help="default: digits; for memory, cifar10")
    parser.add_argument("--published", type=Path, metavar="DIR")
    parser.add_argument("--batch", type=int, help="global batch (default: the config's)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    options, changes = parser.parse_known_args(argv)
    options.changes = changes
    options.config = options.config or f"configs/{'cifar10' if options.part == 'memory' else 'digits'}.yaml"
    print(f"{options.part}: {options.config}, {device_name()}")
    {"overhead": overhead, "recipe": recipe, "memory": memory, "wait": wait}[options.part](options)


def overhead(options: argparse.Namespace) -> None:
    config = configured(options, 1)
    ours, theirs = our_step(config, new_student(config)), plain_step(config, new_student(config))
    ratios = in_turn(ours, theirs, options)
    print(
        f"a step through DeepSpeed takes {quartiles(ratios)} of one of a plain loop, batch {config.training.batch_size}"
    )


def recipe(options: argparse.Namespace) -> None:
    if options.published is None:
        print("recipe needs --published DIR, a checkout of the published implementation; left out")
        return
    spawn(_recipe_rank, processes(2), options)


def _recipe_rank(rank: int, world: int, port: int, options: argparse.Namespace) -> None:
    as_rank(rank, world, port)
    config = configured(options, world)
    config = config.model_copy(update={"network": config.network.model_copy(update={"channels": 3})})
    settings = config.student
    form = Form(settings.modes, settings.operator, settings.prediction, settings.points)
    torch.manual_seed(0)
    ours = our_step(config, DSNO(config.network, form, config.trajectories.time_points))
    theirs = published_step(config, published_network(config, options.published))
    ratios = in_turn(theirs, ours, options)
    if rank == 0:
        print(
            f"{settings.operator}: images/s are {quartiles(ratios)} of the published recipe's, {world} process(es) of one thread"
        )


def memory(options: argparse.Namespace) -> None:
    rows = []
    os.environ["MALLOC_MMAP_THRESHOLD_"] = (
        "65536"  # what is freed goes back to the system, and is not counted
    )
    for stage in range(4):
        gathered = Path(f"/tmp/dsno-memory-{os.getpid()}-{stage}")
        spawn(_memory_rank, processes(4), options, stage, gathered)
        held, peak = json.loads(gathered.read_text())
        gathered.unlink()
        rows.append([str(stage), f"{held / 2**20:.0f} MiB", f"{peak / 2**20:.0f} MiB"])
        console.say(f"stage {stage}: {rows[-1][1:]}")
    header = ["ZeRO stage", "held between steps", "at the peak of a step"]
    console.table(f"memory of a rank, over the libraries' (the largest of {processes(4)})", header, rows)


def _memory_rank(
    rank: int, world: int, port: int, options: argparse.Namespace, stage: int, out: Path
) -> None:
    as_rank(rank, world, port)
    changes = [
        f"training.zero_stage={stage}",
        f"training.batch_size={options.batch or world}",
        "training.loss=l1",
    ]
    config = load_config(
        options.config, [*changes, "training.threads=1", "student.operator=series", "student.modes=1"]
    )
    ranks = join_ranks(config)
    before = held_bytes()
    torch.manual_seed(0)
    form = Form(1, "series", "data")
    step = our_step(config, DSNO(config.network, form, config.trajectories.time_points))
    step()
    peak_starts_anew()
    step()
    measured = [held_bytes() - before, peak_bytes() - before]
    figures = torch.tensor(measured, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(figures, dist.ReduceOp.MAX)
    if rank == 0:
        out.write_text(json.dumps(figures.tolist()))


def held_bytes() -> int:
    """What this process holds: of tensors on its GPU, or of memory."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else status("VmRSS")


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM")


def peak_starts_anew() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def wait(options: argparse.Namespace) -> None:
    """A real training of 400 steps, on trajectories that are made first."""
    root = "runs/training-benchmark"
    words = [options.config, f"storage.root={root}", "training.steps=400", "training.checkpoint_every=400"]
    words += ["training.log_every=400", f"name=wait-{os.getpid()}"]
    for command in (["gen-trajectories", *words], ["train", *words]):
        subprocess.run(
            [sys.executable, "-m", "dsno_cluster.cli", *command, "--launcher", "local"], check=True
        )
    line = json.loads(Path(f"{root}/students/wait-{os.getpid()}/metrics.jsonl").read_text().splitlines()[-1])
    print(
        f"waited for data in {line['data_wait']:.2%} of the time, at {line['images_per_second']:.0f} images/s"
    )


def configured(options: argparse.Namespace, world: int) -> Config:
    changes = [f"training.threads={1 if world > 1 else 2}", "training.loss=l1"]
    changes += [f"training.batch_size={options.batch}"] if options.batch else []
    return load_config(options.config, [*changes, *options.changes])


def our_step(config: Config, student: DSNO) -> Step:
    """A step of `training/loop.py`, without checkpoints and display."""
    ranks = join_ranks(config)
    engine = make_engine(student.train(), config, ranks)
    ema = EMA(fragments_of(engine), config.training.ema_decays)
    batch, objective = data(config, ranks.world_size), TrajectoryObjective(config, ranks.device)
    batch = batch.pinned() if ranks.device.type == "cuda" else batch  # as the reader gives it

    def step() -> None:
        loss, figures = objective.loss(engine, batch, 0)
        engine.backward(loss)
        engine.step()
        ema.update(1000, True)
        dist.all_reduce(torch.cat([figures, figures.new_zeros(2)]))

    return step


def plain_step(config: Config, student: DSNO) -> Step:
    """The same without an engine: a dozen lines of torch."""
    student.to(compute_device())
    optimizer = torch.optim.Adam(student.train().parameters(), lr=config.training.lr)
    average = copy.deepcopy(student)
    batch, objective = data(config, 1), TrajectoryObjective(config, compute_device())

    def step() -> None:
        loss, _ = objective.loss(student, batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lerp_all(list(average.parameters()), list(student.parameters()), 0.001)
        loss.detach().item()

    return step


def published_step(config: Config, network: nn.Module) -> Step:
    device = compute_device()
    model = nn.parallel.DistributedDataParallel(network.train().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.training.lr)
    batch = data(config, dist.get_world_size())
    times = time_points("quadratic", 4)
    levels = logsnr(torch.tensor(times)).float().to(device)
    weights_M = loss_weights("snr", times).float().to(device)

    def there(x: Tensor) -> Tensor:  # from the reader's memory, as ours
        return x.to(device, non_blocking=True)

    def step() -> None:
        labels = None if batch.labels is None else there(batch.labels)
        loss = weighted(l1(model(there(batch.noise), levels, labels), there(batch.states)), weights_M)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def data(config: Config, world: int) -> Batch:
    """One rank's batch, made up."""
    network, count = config.network, config.training.batch_size // world
    shape = network.state_shape
    draw = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % network.num_classes if network.num_classes else None
    noise = torch.randn(count, *shape, generator=draw)
    states = torch.randn(count, config.trajectories.num_points, *shape, generator=draw)
    batch = Batch(np.arange(count), noise, states, labels)
    return batch.pinned() if torch.cuda.is_available() else batch


def in_turn(first: Step, second: Step, options: argparse.Namespace) -> list[float]:
    """Seconds of `first` over seconds of `second`, round by round; one round before does not count."""

    def seconds(step: Step) -> float:
        wait_for_gpu()
        began = time.perf_counter()
        for _ in range(options.steps):
            step()
        wait_for_gpu()
        return time.perf_counter() - began

    return [seconds(first) / seconds(second) for _ in range(options.rounds + 1)][1:]


def quartiles(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def processes(wanted: int) -> int:
    """So many, or on a machine with GPUs at most one for each."""
    return min(wanted, visible_gpus() or wanted)


def spawn(work: Callable[..., None], world: int, *arguments: Any) -> None:
    arguments = (work, world, free_ports(1)[0], *arguments)
    torch.multiprocessing.spawn(_spawned, arguments, world)  # type: ignore[attr-defined, no-untyped-call]


def _spawned(rank: int, work: Callable[..., None], world: int, port: int, *arguments: Any) -> None:
    work(rank, world, port, *arguments)
    dist.destroy_process_group()


def as_rank(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
    }
    os.environ.update({name: str(value) for name, value in names.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
