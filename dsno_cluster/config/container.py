"""The container in which a stage's tasks run."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dsno_cluster.config.base import SECRETS, Strict
from dsno_cluster.config.paths import ContainerImage, Mount


def _words(options: tuple[str, ...]) -> tuple[str, ...]:
    for option in options:
        names = re.findall(r"([\w-]+)=", option)  # both of --env=NAME=value
        if (name := next((name for name in names if re.search(SECRETS, name.upper())), None)) is not None:
            raise ValueError(
                f"{name} looks like a secret, and the script would show it; set it in the shell that submits"
            )
        if not option.startswith("-"):
            raise ValueError(f"{option!r} is not an option, which begins with - and has its value after =")
    return options


class Container(Strict):
    """The container in which the tasks of a job run. The batch script itself runs outside of it."""

    runtime: Literal["pyxis", "apptainer", "singularity"] = Field(
        description="what starts it: the options that Pyxis adds to srun, or `apptainer exec`, or `singularity exec`"
    )
    image: ContainerImage = Field(
        description="a file or folder (a path with a / at its beginning, or ./ or ~), or an address as the runtime takes it"
    )
    mounts: tuple[Mount, ...] = Field(
        (),
        description=(
            "folders that the tasks see besides those of the experiment: PATH, PATH:INSIDE or PATH:INSIDE:ro; the working "
            "directory, `run.dir`, `storage.root` and the files that the config or an option names are mounted in any case"
        ),
    )
    python: str = Field("python3", description="the Python of the image, with the package's dependencies")
    options: Annotated[tuple[str, ...], AfterValidator(_words)] = Field(
        (), description="further options of the runtime, each as one word: [--no-container-mount-home]"
    )
