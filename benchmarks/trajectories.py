"""What the machinery costs, and what a better solver saves. Two questions, each a ratio of things run in turn:

1. Trajectories/s through Ray actors, shards and storage, against a bare loop of the same solver in as many
   processes, at the same batch and threads. Rounds of both, in turn; the median ratio. Target: 0.95.
2. The same trajectories at the same accuracy, against diffusers' own DDIM loop, on one diffusers network: how many
   evaluations fewer (measured on the digits teacher by benchmarks/solvers.py), times how much less each costs.

    python benchmarks/trajectories.py [--evaluations 36] [key=value ...]

Some minutes on two cores, and nothing else may run. `--evaluations` is what the config's solver needs to be as
accurate as 512-step DDIM, as benchmarks/solvers.py prints.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from typing import Any

import torch

from dsno_cluster import console, load_teacher, solve
from dsno_cluster.cluster.crew import Crew, shared
from dsno_cluster.cluster.ray_pool import import_ray, local_ray, run_pool
from dsno_cluster.config import Config, load_config
from dsno_cluster.device import compute_device, wait_for_gpu
from dsno_cluster.teachers import find_teacher
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.solve_actor import SolveActor
from dsno_cluster.trajectories.spec import solve_shard, spec_of

ROUNDS = 5
SHARDS_A_ROUND = 16
DDIM_STEPS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, help="of our solver, for the accuracy of 512-step DDIM")
    parser.add_argument("--actors", type=int, default=2)
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("configs/digits.yaml", [f"storage.root={folder}", *overrides])
        machinery(config, options.actors)
    against_diffusers(options.evaluations)


def machinery(config: Config, actors: int) -> None:
    """Question 1."""
    samples = SHARDS_A_ROUND * config.trajectories.samples_per_shard
    rates: dict[str, list[float]] = {"bare loop": [], "actors, shards, storage": []}
    crew = Crew(actors, shared(actors))
    with bare_workers(config, actors) as bare, local_ray(crew, config.trajectories.threads) as cluster:
        remote = import_ray().remote(max_concurrency=2, **cluster.actor_options())(SolveActor)
        plan = make_plan(config)
        handles = [
            remote.remote(plan.spec, config.teacher, config.storage, plan.folder) for _ in range(actors)
        ]
        import_ray().get([handle.environment.remote() for handle in handles])
        for number in range(ROUNDS):
            began = time.perf_counter()
            bare(SHARDS_A_ROUND // actors)
            rates["bare loop"].append(samples / (time.perf_counter() - began))
            spare = list(handles)
            began = time.perf_counter()
            shards = range(number * SHARDS_A_ROUND, (number + 1) * SHARDS_A_ROUND)
            pool = run_pool(
                spare.pop,
                lambda actor, index: actor.make_shard.remote(index),
                shards,
                cluster.capacity,
                in_flight=2,
                release=lambda actor: None,
            )
            done = sum(1 for _ in pool)
            assert done == SHARDS_A_ROUND
            rates["actors, shards, storage"].append(samples / (time.perf_counter() - began))
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    rows = [
        [name, f"{statistics.median(values):.0f}", " ".join(f"{v:.0f}" for v in values)]
        for name, values in rates.items()
    ]
    console.table(
        f"trajectories/s, {actors} processes of {config.trajectories.threads} thread(s), in turn",
        ["", "median", "rounds"],
        rows,
    )
    rounds = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"through the machinery: {statistics.median(ratios):.3f} of the bare loop (rounds {rounds})")


class bare_workers:
    """`actors` processes that solve shards and throw them away: the loop without the machinery."""

    def __init__(self, config: Config, actors: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        self.processes = []
        for _ in range(actors):
            ours, theirs = context.Pipe()
            process = context.Process(target=_solve_on_demand, args=(config, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Any:
        for pipe in self.pipes:
            pipe.recv()

        def run(shards: int) -> None:
            for pipe in self.pipes:
                pipe.send(shards)
            for pipe in self.pipes:
                pipe.recv()

        return run

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.terminate()


def _solve_on_demand(config: Config, pipe: Any) -> None:
    torch.set_num_threads(config.trajectories.threads)
    found = find_teacher(config)
    spec, teacher = spec_of(config, found), found.load().to(compute_device())
    pipe.send("ready")
    while True:
        for index in range(pipe.recv()):
            solve_shard(spec, teacher, index)
        pipe.send("done")


def against_diffusers(evaluations: int | None) -> None:
    """Question 2."""
    try:
        import diffusers
    except ImportError:
        print("diffusers is not installed: pip install diffusers for the second question")
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network: Any = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler: Any = diffusers.DDIMScheduler(clip_sample=False)
    device = compute_device()
    noise = torch.randn(16, 3, 32, 32).to(device)
    times = (0.5625, 0.25, 0.0625, 0.0)
    steps = 32

    @torch.no_grad()
    def theirs() -> None:
        """The loop of diffusers' DDIMPipeline, with the states kept that we keep."""
        scheduler.set_timesteps(steps)
        x, kept = noise, []
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x, eta=0.0).prev_sample
            kept.append(x)

    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(f"{folder}/unet")
        scheduler.save_pretrained(f"{folder}/scheduler")
        teacher = load_teacher(folder).to(device)
    network.to(device)

    def ours() -> None:
        solve(teacher, noise, times, "abm3", steps)

    seconds: dict[str, list[float]] = {"diffusers DDIM": [], "ours": []}
    for _ in range(ROUNDS):
        for name, run in zip(seconds, (theirs, ours), strict=True):
            wait_for_gpu()
            began = time.perf_counter()
            run()
            wait_for_gpu()
            seconds[name].append(time.perf_counter() - began)
    each = {name: statistics.median(values) / steps for name, values in seconds.items()}
    overhead = each["diffusers DDIM"] / each["ours"]
    print(
        f"an evaluation of 16 images, one thread: diffusers' loop {each['diffusers DDIM'] * 1e3:.1f} ms, "
        f"ours {each['ours'] * 1e3:.1f} ms: factor {overhead:.2f}"
    )
    if evaluations is not None:
        fewer = DDIM_STEPS / evaluations
        print(f"evaluations for the accuracy of {DDIM_STEPS}-step DDIM: {evaluations}: factor {fewer:.1f}")
        print(f"both together: {fewer * overhead:.1f}")


if __name__ == "__main__":
    main()
