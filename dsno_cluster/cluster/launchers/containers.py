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
from dsno_cluster.files import CACHE_HOME, cache_folder
from dsno_cluster.model_folder import BEST, LATEST
from dsno_cluster.storage import absolute_address
from dsno_cluster.teachers.diffusers_files import MODEL_INDEX

MOST_LINKS = 16  # into one folder, which is mounted whole if there are more
# what an image has of its own, and what a link leads to must not replace
OF_THE_IMAGE = ("/bin/", "/dev/", "/etc/", "/lib/", "/lib64/", "/proc/", "/sbin/", "/sys/", "/usr/")


def container_words(container: Container, submission: Submission) -> tuple[list[str], list[str]]:
    """Options of srun, and the words that stand before those of the task, each quoted for the shell.

    The container sees the working directory, the places of the experiment and the files that its config and the stage's
    options name, the folder for downloads, and what links lead to from these, all under the paths that they have outside.
    Raises UserError for one of these that cannot be mounted.
    """
    places = _outermost(_places(submission))
    if odd := next((place for place in places if ":" in place or "," in place), None):
        raise UserError(f"{odd}: a path with : or , cannot be mounted in a container")
    mounts = [*places, *container.mounts]
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
    named = [*_files_of(config.model_dump(mode="json")), *_files_of(options), str(config.run_dir.absolute())]
    if "://" not in config.storage.root:
        named.append(config.storage.root)  # it may not be there yet, as it is made when the job is submitted
    if (cache := _cache(submission)) is not None:
        named.append(str(cache))
    # without .., by which a path seems to be inside a folder that it leaves
    named = [os.path.normpath(place) for place in named]
    targets = [target for place in named for target in _targets(place)]
    return [os.getcwd(), *map(_seen_as_link, named), *targets, *_linked(named)]


def container_setup(submission: Submission) -> list[str]:
    """The lines of the batch script by which the tasks find in their container what was downloaded at submission."""
    if submission.profile.container is None or (cache := _cache(submission)) is None:
        return []
    lines = ["# for what was downloaded at submission, as a container may have another home"]
    return [*lines, f"export {CACHE_HOME}=${{{CACHE_HOME}:-{shlex.quote(str(cache.parent))}}}"]


def make_mounted_folders(submission: Submission) -> None:
    """Make the folders of the experiment and the user that are mounted, if they are not there yet. Raises OSError."""
    if submission.profile.container is None:
        return
    if "://" not in (root := submission.config.storage.root):
        Path(root).mkdir(parents=True, exist_ok=True)
    if (cache := _cache(submission)) is not None:
        cache.mkdir(parents=True, exist_ok=True)


def _cache(submission: Submission) -> Path | None:
    """The folder for downloads; None if it is not there and cannot be made, or if the profile chooses another one."""
    if CACHE_HOME in submission.profile.environment:
        return None
    try:
        folder = cache_folder().absolute()
    except UserError:
        return None
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    can_be = os.path.isdir(there) and (there == folder or os.access(there, os.W_OK))
    return folder if can_be else None


def _files_of(values: Any) -> Iterator[str]:
    """The files and folders that exist among values, and those in which the files of a pattern are."""
    if isinstance(values, str):
        if os.path.isabs(values) and os.path.exists(values):
            # `latest` and `best` of a run only name the student's folder beside them
            around = os.path.dirname(values)
            names_another = os.path.basename(values) in (LATEST, BEST) and os.path.isfile(values)
            # the scheduler of a pipeline's network is in another folder of the pipeline
            in_pipeline = os.path.isfile(os.path.join(around, MODEL_INDEX))
            yield around if names_another or in_pipeline else values
        elif os.path.isabs(values) and len(plain := re.split(r"[*?{\[]", values, maxsplit=1)) > 1:
            folder = os.path.dirname(plain[0])  # such as /data of /data/in64-{000..146}.tar
            if folder != "/" and os.path.isdir(folder):
                yield folder
    elif isinstance(values, dict):
        yield from _files_of(list(values.values()))
    elif isinstance(values, list):
        for value in values:
            yield from _files_of(value)


def _targets(path: str) -> Iterator[str]:
    """The paths to which links in a path lead, one after the other: the last of them has no links."""
    for link in [*reversed(Path(path).parents), Path(path)]:
        if os.path.islink(link) and os.path.exists(link):
            target = os.path.normpath(link.parent / os.readlink(link) / Path(path).relative_to(link))
            yield target
            yield from _targets(target)
            return


def _seen_as_link(place: str) -> str:
    """The folder around a place that is a link to a folder; any other place as it is.

    Mounted by itself it would be a folder, and relative links in it would lead elsewhere.
    """
    around = os.path.dirname(place)
    return around if os.path.islink(place) and os.path.isdir(place) and around != "/" else place


def _linked(places: Iterable[str]) -> Iterator[str]:
    """What is reached by links in folders and in the folders in these, as in Hugging Face's snapshots of a pipeline."""
    by_folder: dict[str, set[str]] = {}
    for link in (link for place in places for link in _links_in(place)):
        # where the link leads if a folder above it is a link too, but a mounted folder in the container
        mounted = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))
        for target in (*_targets(link), mounted):
            of_the_image = target == "/" or (target + "/").startswith(OF_THE_IMAGE)
            if os.path.exists(target) and not of_the_image:
                by_folder.setdefault(os.path.dirname(target), set()).add(target)
    for folder, targets in by_folder.items():
        yield from [folder] if len(targets) > MOST_LINKS and folder != "/" else targets


def _links_in(folder: str, deep: bool = True) -> Iterator[str]:
    """The links in a folder and, if `deep`, in the folders in it; none if it is a file, is not there or cannot be read."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_symlink():
            yield entry.path
        elif deep and entry.is_dir():
            yield from _links_in(entry.path, deep=False)


def _outermost(paths: Iterable[str]) -> list[str]:
    """The paths, sorted, without those inside another one."""
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda path: Path(path).parts):
        if not any(Path(path).is_relative_to(other) for other in kept):
            kept.append(path)
    return kept
