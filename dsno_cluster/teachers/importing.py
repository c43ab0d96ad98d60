"""Import of a published checkpoint, student or teacher, as a dsno-cluster model folder."""

from __future__ import annotations

import hashlib

from dsno_cluster.errors import UserError
from dsno_cluster.model_folder import META, AboutModel, ModelDescription, ModelMeta, write_model
from dsno_cluster.records import read_record
from dsno_cluster.storage import (
    MissingObject,
    PreconditionFailed,
    Storage,
    only_writer,
    open_storage,
    read_file,
    split_path,
)
from dsno_cluster.students.published_format import recognise
from dsno_cluster.students.published_students import read_published_student
from dsno_cluster.teachers.flax_teachers import read_published_teacher
from dsno_cluster.weight_files import HEAD
from dsno_cluster.yaml_text import dump_yaml, parse_yaml


def import_weights(
    src: str, published_yaml: str, out_dir: str, endpoint_url: str | None = None, command: str = ""
) -> str:
    """Write the published student or teacher at `src` as the model folder `out_dir`.

    `src`, `published_yaml` and `out_dir` are paths or S3 addresses. The kind is recognised by the first bytes
    and returned: "student" or "teacher". Raises UserError for a file of another kind, a switch that is not
    implemented, tensors that are missing, surplus or misshapen, and if `out_dir` is a folder of something
    else, such as another model.
    """
    data, text = read_file(src, endpoint_url), read_file(published_yaml, endpoint_url)
    if is_student := recognise(data[:HEAD]) == "torch":
        student = read_published_student(data, src, text, published_yaml)
        model, weights = student.model, student.weights
    else:
        teacher = read_published_teacher(data, src, text, published_yaml)
        model, weights = teacher.description.model_dump(mode="json"), teacher.weights
    about = AboutModel(
        model=ModelDescription.model_validate(model),
        made_by=command or "dsno_cluster.teachers.importing.import_weights",
        imported={
            "file": src.rstrip("/").rpartition("/")[2],
            "sha256": hashlib.sha256(data).hexdigest(),
            "config": parse_yaml(text.decode(), published_yaml),
        },
    )
    config = dump_yaml({"network": model["network"]})
    parent, name = split_path(out_dir)
    storage = open_storage(parent, endpoint_url)
    try:
        with only_writer(storage, f"{name}-writing.json"):
            _check_replaced(storage, name, out_dir, about)
            write_model(storage, f"{name}/", weights, config, about)
    except PreconditionFailed as error:
        raise UserError(f"--out {out_dir}: {error}; name a new folder") from None
    return "student" if is_student else "teacher"


def _check_replaced(storage: Storage, name: str, out_dir: str, about: AboutModel) -> None:
    """Raises UserError if the folder holds a model that is not an import of the same file."""
    try:
        there = read_record(ModelMeta, storage.read(f"{name}/{META}"), f"{out_dir}/{META}").imported
    except MissingObject:
        return
    assert about.imported is not None
    if there is None or there.get("sha256") != about.imported["sha256"]:
        what = f"that of {there.get('file')}" if there else "which was not imported"
        raise UserError(f"--out {out_dir}: holds another model, {what}; name a new folder, or delete it")
