"""How many Ray actors share the work, and what each of them takes of a machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

ROUNDING = 1e-6  # so that three shares of 1/3 fill a GPU


@dataclass(frozen=True)
class Crew:
    """The Ray actors that are asked for.

    `actors`: their number; None: as many as there is room for, on an existing cluster also on nodes that join later.
    `gpus_per_actor`: what each takes of the GPUs, if there are any; below 1, several share one. None: a whole one.
    `ray_address`: an existing Ray cluster; None: that of RAY_ADDRESS, or else one of our own on this machine.
    """

    actors: int | None = None
    gpus_per_actor: float | None = None
    ray_address: str | None = None


ANY_CREW = Crew()


def actors_that_fit(node: Mapping[str, float], threads: int, num_gpus: float) -> int:
    """How many actors of `threads` CPUs and `num_gpus` GPUs fit on a node with these `CPU` and `GPU`."""
    fit = int(node.get("CPU", 0)) // threads
    return min(fit, actors_on_gpus(int(node.get("GPU", 0)), num_gpus)) if num_gpus else fit


def actors_on_gpus(gpus: int, each: float) -> int:
    """How many actors there are on `gpus` GPUs of which each takes so many, or a share of one."""
    return gpus * int(1 / each + ROUNDING) if each < 1 else gpus // int(each)


def shared(actors: int) -> float | None:
    """What each of so many actors takes of the GPUs of this machine if they are fewer; None: a whole one."""
    from dsno_cluster.device import visible_gpus

    each = -(-actors // (visible_gpus() or actors))
    return None if each == 1 else 1 / each


def default_actors(threads: int, gpus: int, each: float) -> int:
    """As many actors as the GPUs of this machine have room for, or else as its cores hold at `threads` each."""
    return actors_on_gpus(gpus, each) if gpus else max(1, len(os.sched_getaffinity(0)) // threads)


def actor_count(crew: Crew, threads: int) -> str:
    """How many actors there will be, in words, for the line that announces the work."""
    many = f"{crew.actors} actor(s)" if crew.actors else "as many actors"
    share = f" and {crew.gpus_per_actor:g} GPU" if crew.gpus_per_actor not in (None, 1) else ""
    return f"{many} of {threads} thread(s){share}{'' if crew.actors else ' as fit'}"


def keep_to_share() -> None:
    """Keep this process to what Ray has assigned to it of a GPU that others use too."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():  # an actor outside of Ray
        return
    share = ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0)
    if share < 1.0:
        from dsno_cluster.device import limit_memory

        limit_memory(share)
