"""The door: a published checkpoint, of either kind, as a model folder of ours."""

from __future__ import annotations

import hashlib

import yaml

from dsno_cluster.config import parse_yaml
from dsno_cluster.errors import UserError
from dsno_cluster.model_folder import AboutModel, ModelDescription, write_model
from dsno_cluster.storage import PreconditionFailed, open_storage, read_file, split_path
from dsno_cluster.students.published_format import recognise
from dsno_cluster.students.published_students import read_published_student
from dsno_cluster.teachers.flax_teachers import read_published_teacher


def import_weights(
    src: str, published_yaml: str, out_dir: str, endpoint_url: str | None = None, command: str = ""
) -> str:
    """Write the published student or teacher at `src`, told apart by its first bytes, as the model folder `out_dir`.

    `src`, `published_yaml` and `out_dir` are paths or S3 addresses. Returns what it was, "student" or "teacher".
    Raises UserError for a file of another kind, a switch that is not implemented, tensors that are missing, surplus or
    misshapen, by name, and where `out_dir` is a folder of something else.
    """
    data, text = read_file(src, endpoint_url), read_file(published_yaml, endpoint_url)
    student = recognise(data[:4]) == "torch"
    read = read_published_student if student else read_published_teacher
    published = read(data, src, text, published_yaml)
    about = AboutModel(
        model=ModelDescription.model_validate(published.model),
        made_by=command or "dsno_cluster.teachers.importing.import_weights",
        imported={
            "file": src.rstrip("/").rpartition("/")[2],
            "sha256": hashlib.sha256(data).hexdigest(),
            "config": parse_yaml(text.decode(), published_yaml),
        },
    )
    config = yaml.safe_dump({"network": published.model["network"]}, sort_keys=False)
    parent, name = split_path(out_dir)
    try:
        write_model(open_storage(parent, endpoint_url), f"{name}/", published.weights, config, about)
    except PreconditionFailed as error:
        raise UserError(f"--out {out_dir}: {error}; name a new folder") from None
    return "student" if student else "teacher"
