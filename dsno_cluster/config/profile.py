"""Job profiles: where a stage runs."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dsno_cluster.config.base import SECRETS, PositiveInt, Strict
from dsno_cluster.config.container import Container

_OURS = "dsno-cluster sets it itself"
# options of sbatch that another key of a profile sets, or that dsno-cluster needs to run and follow a job
OWN_OPTIONS = {
    **{key: f"is {key} of the profile" for key in ("nodes", "partition", "account", "qos", "constraint")},
    "time": "is time_minutes of the profile",
    "mem": "is mem_gb of the profile",
    "cpus-per-task": "is cpus_per_task of the profile",
    "gpus-per-node": "is gpus_per_node of the profile",
    "ntasks-per-node": "is tasks_per_node of the profile",
    "ntasks": "is nodes x tasks_per_node of the profile",
    "signal": "is save_seconds of the profile",
    **dict.fromkeys(
        ("output", "error", "job-name", "dependency", "array", "open-mode", "chdir", "wait"), _OURS
    ),
}


def slurm_minutes(text: str) -> float | None:
    """Minutes of a time as Slurm writes it, such as 90, 30:00, 12:00:00 or 1-00:00:00; None for anything else."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip(), re.ASCII)
    if found is None:
        return None
    days, numbers = found[1], [int(number) for number in found.groups()[1:] if number is not None]
    if any(n >= most for n, most in zip(numbers, (24 if days else math.inf, 60, 60), strict=False)):
        return None
    if days:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def _minutes(value: Any) -> Any:
    """`value` in minutes, rounded up, if it is a text."""
    if not isinstance(value, str):
        return value
    if (minutes := slurm_minutes(value)) is None:
        raise ValueError(
            f"{value!r} is not a number of minutes, nor a time as Slurm writes it: 30:00 (30 minutes), 12:00:00 (12 hours), "
            "1-12:00:00 (a day and a half)"
        )
    return math.ceil(minutes)


def is_share(value: float) -> bool:
    """Whether an actor can take so much of the GPUs: a part of one, or a whole number of them."""
    return 0.0 < value < 1.0 or (value >= 1.0 and math.isfinite(value) and value == int(value))


def _share(value: float) -> float:
    if not is_share(value):
        raise ValueError(f"{value:g} is neither a part of a GPU, such as 0.25, nor a whole number of them")
    return value


class Profile(Strict):
    """Where a stage runs: a file of `jobs/`. Options of the command line take precedence over it."""

    nodes: PositiveInt = Field(1, description="number of nodes; --nodes takes precedence")
    tasks_per_node: PositiveInt = Field(
        1, description="processes per node; for train one per GPU, for the Ray stages one"
    )
    gpus_per_node: Annotated[int, Field(ge=0)] = Field(
        0, description="GPUs of each node; 0: the work is done by CPUs"
    )
    gpus_per_actor: Annotated[float, AfterValidator(_share)] = Field(
        1.0,
        description=(
            "what each actor of a Ray stage takes of the GPUs: 1, or a part such as 0.25, so that four actors share a GPU, which "
            "small networks do not fill; --gpus-per-actor takes precedence"
        ),
    )
    cpus_per_task: PositiveInt = Field(
        1, description="CPUs of each training process, or of a Ray stage on each node"
    )
    mem_gb: PositiveInt = Field(description="memory per node in GB")
    time_minutes: Annotated[PositiveInt, BeforeValidator(_minutes)] = Field(
        description="time limit of an attempt in minutes, or as Slurm writes it: MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS"
    )
    partition: str | None = Field(
        None, description="the partition; null: that of SBATCH_PARTITION, or the cluster's default"
    )
    account: str | None = Field(
        None, description="the account; null: that of SBATCH_ACCOUNT, or the user's default"
    )
    qos: str | None = Field(None, description="the QOS; null: that of SBATCH_QOS, or the user's default")
    constraint: str | None = Field(None, description="features that nodes must have, e.g. a100")
    setup: tuple[str, ...] = Field(
        (), description="shell lines that run on the first node before the job, e.g. module load"
    )
    environment: dict[str, str] = Field(default_factory=dict, description="variables of the job; no secrets")
    interface: str | None = Field(
        None,
        description="network interface between the nodes, e.g. ib0; null: the one that leads to the other nodes",
    )
    container: Container | None = Field(None, description="the container in which the tasks run; null: none")
    save_seconds: PositiveInt = Field(
        120,
        description="how long before its time limit the job is warned, so that it saves and is requeued, in seconds",
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        3,
        description="how many times in a row the job is started again although the last attempt made no progress",
    )
    chain: PositiveInt = Field(
        1,
        description=(
            "number of jobs that are submitted for the stage, each to continue where the one before it had to end, for clusters "
            "that forbid requeue; 1: a single job, which is requeued"
        ),
    )
    hang_minutes: Annotated[float, Field(gt=0)] = Field(
        30,
        description="a task or an actor whose work shows no sign of life for this long is ended, and begins again, in minutes",
    )
    sbatch: dict[str, str | bool] = Field(default_factory=dict, description="further options of sbatch")

    @property
    def sbatch_options(self) -> dict[str, str | bool]:
        """`sbatch` as options: false flags are omitted, except that `requeue: false` and a chain become `no-requeue`."""
        options: dict[str, str | bool] = {
            key: value for key, value in self.sbatch.items() if value is not False
        }
        return options if self.requeue else {**options, "no-requeue": True}

    @property
    def requeue(self) -> bool:
        """Whether the job may be started again by Slurm."""
        return (
            self.chain == 1 and self.sbatch.get("requeue") is not False and not self.sbatch.get("no-requeue")
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Profile:
        for key in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise ValueError(f"environment: {key!r} is not the name of a variable")
        # values taken from a command or another variable do not appear in the script
        written = [name for line in self.setup for name in re.findall(r"\b(\w+)=(?![\"']?[$`])", line)]
        for place, names in (("environment", [*self.environment]), ("setup", written)):
            for name in names:
                if re.search(SECRETS, name.upper()):
                    raise ValueError(
                        f"{place}: {name} looks like a secret, and the script would show it; S3 credentials belong in "
                        "~/.aws/credentials or in the shell that submits"
                    )
        for key in self.sbatch:
            if (own := OWN_OPTIONS.get(key.replace("_", "-"))) is not None:
                raise ValueError(f"sbatch: {key}: {own}")
        if self.chain > 1 and self.sbatch.get("requeue"):
            raise ValueError(
                f"chain {self.chain}: not with `requeue` in sbatch; leave one out: a job is requeued or the next continues it"
            )
        if self.time_minutes * 60 <= self.save_seconds:
            raise ValueError(
                f"save_seconds {self.save_seconds}: not below the time limit of {self.time_minutes} minutes"
            )
        return self
