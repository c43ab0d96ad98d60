"""fetch-teacher: downloads a teacher by name, once and for good, and pins what it downloaded.

A folder holds one revision. `fetched.json` beside the files says which, and the sha256 of each; a folder with other files, or
with another revision, is never written to. An interrupted download is continued.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dsno_cluster import console
from dsno_cluster.errors import UserError, WorkError, without_passwords
from dsno_cluster.files import file_sha256, locked_if_possible, replace_file, shown_path
from dsno_cluster.records import Record, read_record, record_bytes
from dsno_cluster.teachers import hub
from dsno_cluster.teachers.identity import weights_sha256
from dsno_cluster.teachers.inspection import yaml_of
from dsno_cluster.teachers.loading import teacher_info
from dsno_cluster.teachers.official_files import Place, official_place

RECORD, LOCK, PART = "fetched.json", ".fetching", ".part"
CHUNK = 2**20  # bytes
TIMEOUT = 30.0  # seconds without a byte


class FetchedFile(Record):
    size: int
    sha256: str


class Fetched(Record):
    """What a folder holds: `revision` is the commit of a repository, or what a server calls a file's version (ETag)."""

    schema_version: Literal[1] = 1
    name: str
    url: str
    revision: str | None
    complete: bool = False
    files: dict[str, FetchedFile] = Field(default_factory=dict)


def fetch_teacher(
    name: str, revision: str | None = None, out: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Download a teacher; returns its path, and the section `teacher` of a config that uses and pins it.

    `name` is OWNER/NAME of a repository on the hub, a URL, or the name of a published file. `out` is the folder, by default
    one below teachers/. Raises UserError for a name that is not known or no teacher, and for a folder that holds something
    else; WorkError if the network or the disk fails.
    """
    is_repository = bool(hub.REPOSITORY.fullmatch(name))
    if revision is not None and not is_repository:
        raise UserError(
            f"--revision {revision}: only a repository on the hub has revisions, and {name} is a file"
        )
    place = None if is_repository else _place(name)
    stem = name.replace("/", "--") if place is None else Path(_file_name(place, name)).stem
    folder = Path(out) if out is not None else Path("teachers") / stem
    with _held(folder):
        known = _known(folder, name, revision)
        if known is not None and known.complete:
            console.say(f"{shown_path(folder)} holds it already")
            fetched = known
        elif place is None:
            fetched = _fetch_repository(name, revision, folder, known)
        else:
            fetched = _fetch_file(name, place, folder, known)
    path = str(folder) if place is None else str(folder / _file_name(place, name))
    options = place.options if place else {}
    digest = weights_sha256(teacher_info(path, options=options).identity)
    section = {"path": path, "sha256": digest} | ({"options": options} if options else {})
    return path, section | {"revision": fetched.revision}


def section_text(section: dict[str, Any]) -> str:
    """The section as YAML; the revision is a comment, as the sha256 pins it."""
    keys = {key: value for key, value in section.items() if key != "revision"}
    head = f"# revision {section['revision']}\n" if section["revision"] else ""
    return head + yaml_of({"teacher": keys})


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes that fetch out of it; one in which nothing came is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked_if_possible(folder / LOCK):
            yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


def _place(name: str) -> Place:
    if "://" not in name:
        return official_place(name)
    parts = urllib.parse.urlsplit(name)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise UserError(f"{without_passwords(name)}: is no URL like https://host/file.pkl")
    return Place(name, name)


def _file_name(place: Place, name: str) -> str:
    if "://" not in name:
        return name
    found = Path(urllib.parse.unquote(urllib.parse.urlsplit(place.url).path)).name
    if not found or found.startswith("."):
        raise UserError(f"{name}: names no file")
    return found


def _known(folder: Path, name: str, revision: str | None) -> Fetched | None:
    """What the folder holds of this teacher. Raises UserError if it holds something else, or a file is not as it was."""
    file, where = folder / RECORD, shown_path(folder)
    if not file.is_file():
        others = sorted(p.name for p in folder.iterdir() if p.name != LOCK)
        if others:
            raise UserError(
                f"{where}: holds other files ({', '.join(others[:3])}); name a new folder with --out"
            )
        return None
    found = read_record(Fetched, file.read_bytes(), str(file))
    if found.name != name:
        raise UserError(f"{where}: holds {found.name}; name another folder with --out")
    if not found.complete:
        return found
    if (
        revision is not None
        and not str(found.revision).startswith(revision)
        and _commit(name, revision) != found.revision
    ):
        raise UserError(
            f"{where}: holds revision {found.revision} of {name}; name another folder with --out for revision {revision}"
        )
    for key, recorded in found.files.items():
        if not (folder / key).is_file() or _fetched(folder / key) != recorded:
            raise UserError(f"{where}: {key} is not as it was fetched; delete the folder and fetch it again")
    return found


def _commit(name: str, revision: str) -> str:
    return hub.find_repository(name, revision).commit


def _fetch_repository(name: str, revision: str | None, folder: Path, known: Fetched | None) -> Fetched:
    repository = hub.find_repository(name, revision)
    if known is not None and known.revision != repository.commit:
        raise UserError(
            f"{shown_path(folder)}: holds a part of revision {known.revision} of {name}; continue it with --revision "
            f"{known.revision}, or name another folder with --out"
        )
    fetched = Fetched(name=name, url=name, revision=repository.commit)
    replace_file(folder / RECORD, record_bytes(fetched))
    files = {}
    total = sum(file.size or 0 for file in repository.files)
    console.say(f"{len(repository.files)} files, {total:,} bytes, of {name} at {repository.commit}")
    for file in repository.files:
        hub.download(repository, file, folder)
        files[file.name] = found = _fetched(folder / file.name)
        if (file.sha256 or found.sha256) != found.sha256:
            raise WorkError(
                f"{name}: {file.name} has sha256 {found.sha256}, the hub says {file.sha256}; delete it and fetch again"
            )
    return _finished(fetched.model_copy(update={"files": files}), folder)


def _finished(fetched: Fetched, folder: Path) -> Fetched:
    done = fetched.model_copy(update={"complete": True})
    replace_file(folder / RECORD, record_bytes(done))
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes of unfinished downloads
    return done


def _fetched(file: Path) -> FetchedFile:
    return FetchedFile(size=file.stat().st_size, sha256=file_sha256(file))


# ---- a single file -------------------------------------------------------------------------------------------


def _fetch_file(name: str, place: Place, folder: Path, known: Fetched | None) -> Fetched:
    """Download a file by its URL. A part that exists is continued if the server still has the same version."""
    key = _file_name(place, name)
    part = folder / (key + PART)
    have = part.stat().st_size if known is not None and known.revision and part.is_file() else 0
    request = urllib.request.Request(place.url, headers={"User-Agent": "dsno-cluster"})
    if known is not None and have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", str(known.revision))
    try:
        with contextlib.closing(_answer(request, place.url)) as answer:
            continued = answer.status == 206
            fetched = Fetched(name=name, url=place.url, revision=answer.headers.get("ETag"))
            replace_file(folder / RECORD, record_bytes(fetched))
            size = int(answer.headers.get("Content-Length") or 0) + (have if continued else 0)
            with (
                part.open("ab" if continued else "wb") as target,
                console.progress(
                    f"fetching {key}", max(size, 1), "bytes", done=have if continued else 0
                ) as advance,
            ):
                while chunk := answer.read(CHUNK):
                    target.write(chunk)
                    advance(len(chunk))
    except (http.client.HTTPException, TimeoutError, ConnectionError, urllib.error.URLError) as error:
        raise WorkError(
            f"{place.url}: broke off ({error}); the same command continues, on a machine with a network"
        ) from None
    if size and part.stat().st_size != size:
        raise WorkError(
            f"{place.url}: broke off after {part.stat().st_size:,} of {size:,} bytes; the same command continues"
        )
    part.replace(folder / key)
    return _finished(fetched.model_copy(update={"files": {key: _fetched(folder / key)}}), folder)


def _answer(request: urllib.request.Request, url: str) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise UserError(f"{url}: there is no such file (HTTP {error.code})") from None
        raise WorkError(f"{url}: the server answers HTTP {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise WorkError(
            f"{url}: cannot be reached ({error.reason}); run fetch-teacher on a machine with a network, such as a login node, "
            "and copy the folder"
        ) from None
