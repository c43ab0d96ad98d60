"""The command line that runs a job's tasks in a container."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsno_cluster.cluster.stage import Submission
from dsno_cluster.config import Container
from dsno_cluster.errors import UserError
from dsno_cluster.model_folder import BEST, LATEST
from dsno_cluster.storage import absolute_address


def container_words(container: Container, submission: Submission) -> tuple[list[str], list[str]]:
    """Options of srun, and the words that stand before those of the task, each quoted for the shell.

    The container sees the working directory, the places of the experiment and the files that its config and the stage's
    options name, all under the paths that they have outside. Raises UserError for one of these that cannot be mounted.
    """
    places = _places(submission)
    if odd := next((place for place in places if ":" in place or "," in place), None):
        raise UserError(f"{odd}: a path with : or , cannot be mounted in a container")
    mounts = [*_outermost(places), *container.mounts]
    if container.runtime == "pyxis":
        ends = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
        options = [
            f"--container-image={container.image}",
            f"--container-mounts={','.join(ends)}",
            f"--container-workdir={os.getcwd()}",
            *container.options,
        ]
        return [shlex.quote(option) for option in options], [shlex.quote(container.python)]
    words = [
        *(container.runtime, "exec"),
        *(["--nv"] if submission.profile.gpus_per_node > 0 else []),
        *("--bind", ",".join(mounts), "--pwd", os.getcwd()),
        *container.options,
        *(container.image, container.python),
    ]
    return [], [shlex.quote(word) for word in words]


def _places(submission: Submission) -> list[str]:
    """The files and folders of this machine that the tasks see."""
    config = submission.config
    options = [absolute_address(path) for path in submission.options.paths]
    named = [*_files_of(config.model_dump(mode="json")), *_files_of(options)]
    if "://" not in config.storage.root:
        named.append(config.storage.root)  # it may not be there yet, as it is made when the job is submitted
    # without .., by which a path seems to be inside a folder that it leaves
    return [os.path.normpath(place) for place in (os.getcwd(), str(config.run_dir.absolute()), *named)]


def _files_of(values: Any) -> Iterator[str]:
    """The files and folders that exist among values, and those in which the files of a pattern are."""
    if isinstance(values, str):
        if os.path.isabs(values) and os.path.exists(values):
            # of a student, this file only names the folder beside it
            names_another = os.path.basename(values) in (LATEST, BEST) and os.path.isfile(values)
            yield os.path.dirname(values) if names_another else values
        elif os.path.isabs(values) and len(plain := re.split(r"[*?{\[]", values, maxsplit=1)) > 1:
            folder = os.path.dirname(plain[0])  # such as /data of /data/in64-{000..146}.tar
            if folder != "/" and os.path.isdir(folder):
                yield folder
    elif isinstance(values, dict):
        yield from _files_of(list(values.values()))
    elif isinstance(values, list):
        for value in values:
            yield from _files_of(value)


def _outermost(paths: Iterable[str]) -> list[str]:
    """The paths, sorted, without those inside another one."""
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda path: Path(path).parts):
        if not any(Path(path).is_relative_to(other) for other in kept):
            kept.append(path)
    return kept
