"""Launchers of stages, on this machine or on Slurm, behind one protocol."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from dsno_cluster import console
from dsno_cluster.cluster.launchers.local import LocalLauncher
from dsno_cluster.cluster.launchers.protocol import LIVE, Launcher, State, final_state
from dsno_cluster.cluster.launchers.slurm import SlurmLauncher
from dsno_cluster.cluster.runs import Run
from dsno_cluster.cluster.slurm_commands import controller_silence
from dsno_cluster.errors import UserError, WorkError

__all__ = ["LIVE", "LOCAL", "SLURM", "Launcher", "State", "choose_launcher", "launcher_of", "states_of"]

LOCAL: Launcher = LocalLauncher()
SLURM: Launcher = SlurmLauncher()
LAUNCHERS = {launcher.name: launcher for launcher in (LOCAL, SLURM)}


def choose_launcher(asked: str, nodes: int, profile_nodes: int = 1) -> Launcher:
    """The launcher that was asked for. auto is Slurm if sbatch is on PATH and the controller answers within 2 s.

    Raises UserError for slurm without sbatch and for several `nodes` on this machine. Raises WorkError if the
    controller does not answer, for slurm, and for auto if the profile asks for several nodes: work of that
    size does not belong on a login node.
    """
    sbatch = shutil.which("sbatch")
    if asked == SLURM.name:
        if sbatch is None:
            raise UserError(
                "--launcher slurm: there is no sbatch on PATH; load Slurm's module, or take --launcher local"
            )
        silence = controller_silence()
        if silence:
            raise WorkError(
                f"--launcher slurm: {silence}; try again when it answers, or take --launcher local"
            )
        return SLURM
    why = "as asked"
    if asked == "auto":
        silence = controller_silence() if sbatch else "there is no sbatch on PATH"
        if not silence:
            return SLURM
        if sbatch and profile_nodes > 1:
            raise WorkError(
                f"{silence}, and the profile asks for {profile_nodes} nodes; try again when it answers"
            )
        why = silence
        console.say(f"running on this machine: {silence} (--launcher local does not ask Slurm)")
    if nodes > 1:
        raise UserError(
            f"--nodes {nodes}: the local launcher ({why}) has one node; several need --launcher slurm"
        )
    return LOCAL


def launcher_of(run: Run) -> Launcher | None:
    """The launcher that a run was submitted to; None if it was never submitted."""
    return LAUNCHERS.get(run.record().launcher or "")


def states_of(runs: Sequence[Run]) -> dict[Run, State]:
    """The state of each run, in the order of `runs`: from its folder if final, else from its launcher."""
    found: dict[Run, State] = {}
    asked: dict[str, list[Run]] = {}
    for run in runs:
        launcher = launcher_of(run)
        if (final := final_state(run)) is not None:
            found[run] = final
        elif launcher is None or run.record().job is None:
            found[run] = State("failed", "it was never submitted")
        else:
            asked.setdefault(launcher.name, []).append(run)
    for name, those in asked.items():
        found |= LAUNCHERS[name].states(those)
    return {run: found[run] for run in runs}
