"""Opening a teacher by its path: the network, or only what is known without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import BeforeValidator, JsonValue, SerializeAsAny

from dsno_cluster.errors import UserError
from dsno_cluster.teachers.closed_forms import ClosedForm
from dsno_cluster.teachers.diffusers_folder import DiffusersFolder
from dsno_cluster.teachers.edm_pickles import EDMPickle
from dsno_cluster.teachers.factories import Factory
from dsno_cluster.teachers.identity import TeacherIdentity
from dsno_cluster.teachers.own import OwnFolder
from dsno_cluster.teachers.published import PublishedFile
from dsno_cluster.teachers.state_dicts import StateDictFile
from dsno_cluster.teachers.teacher import PRECISIONS, Options, Source, Teacher, TeacherFamily, TeacherInfo

# The first family that recognises a source reads it; if none does, OwnFolder says what is missing.
FAMILIES: tuple[type[TeacherFamily], ...] = (
    ClosedForm,
    Factory,
    OwnFolder,
    DiffusersFolder,
    EDMPickle,
    StateDictFile,
    PublishedFile,
)


def open_teacher(path: str, endpoint_url: str | None = None, options: Options | None = None) -> TeacherFamily:
    """The teacher at `path`, as its family represents it; `info` and `load` read its files later.

    Raises UserError for options that its family does not take.
    """
    source = Source(str(path), endpoint_url)
    found = [family for family in FAMILIES if family.recognises(source)]
    return (found or [OwnFolder])[0](source, options or {})


def load_teacher(
    path: str,
    endpoint_url: str | None = None,
    *,
    precision: str = "float32",
    options: Options | None = None,
    compile: bool = False,
) -> Teacher:
    """The teacher at `path`, on CPU. The package's docstring lists the possible `path` and `options`.

    `precision` (float32, tf32, bfloat16, float16) is that of a network's weights and layers; states, noise levels and x0
    stay float32. With `compile` the network is compiled at its first calls, once for each shape of x.
    Raises UserError if there is none, and for options that its family does not take.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is not one of: {', '.join(PRECISIONS)}")
    return load_in(precision, open_teacher(path, endpoint_url, options), compile=compile)


def load_in(precision: str, family: TeacherFamily, *, compile: bool) -> Teacher:
    """The teacher of an opened family in a precision.

    Raises UserError as `TeacherFamily.load`, and for a teacher without a network that is to be compiled.
    """
    loaded = family.load("float32" if precision == "tf32" else precision)
    if precision == "tf32":
        loaded = replace(loaded, tf32=True)
    if not compile:
        return loaded
    if loaded.network is None:
        raise UserError(
            f"teacher.compile: a {family.kind} teacher has no network to compile; set it to false"
        )
    from dsno_cluster.torch_internals import compile_network

    compile_network(loaded.network)
    return loaded


def teacher_info(path: str, endpoint_url: str | None = None, options: Options | None = None) -> TeacherInfo:
    """What is known of the teacher at `path` without building it. `options` are those of `load_teacher`.

    Our own checkpoints are read without their weights; other files are read whole, for their sha256.
    Raises UserError if there is none, and for options that its family does not take.
    """
    return open_teacher(path, endpoint_url, options).info()


def _by_its_family(value: object) -> object:
    return read_identity(value) if isinstance(value, dict) else value


def read_identity(content: dict[str, JsonValue]) -> TeacherIdentity:
    """The identity in a file, as its family's model. Raises ValueError if no family has that kind."""
    import json

    kinds = {}
    for family in FAMILIES:
        for model in family.identities:
            kinds[model.model_fields["kind"].default] = model
    if content.get("kind") not in kinds:
        raise ValueError(f"teacher of kind {content.get('kind')!r}; this version knows {', '.join(kinds)}")
    return kinds[content["kind"]].model_validate_json(json.dumps(content))


# An identity as a field of a model: read by its family's model, dumped with all of its keys.
AnyTeacherIdentity = Annotated[SerializeAsAny[TeacherIdentity], BeforeValidator(_by_its_family)]
