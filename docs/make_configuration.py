"""Writes docs/configuration.md from the pydantic models: `make docs`. A test compares it with the file."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dsno_cluster.config import Config, Profile, paths
from dsno_cluster.config.renamed import RENAMED_KEYS

FILE = Path(__file__).parent / "configuration.md"

INTRODUCTION = """# Configuration

Written by `make docs` from the models in `dsno_cluster/config/`; change the descriptions there.

An experiment is a YAML file, such as those in `configs/`. The command line can set any key too, as `section.key=value` with the
value written as YAML: `dsno-cluster plan CONFIG trajectories.steps=32 'trajectories.times={spacing: uniform, points: 4}'`. A key
that is unknown, of the wrong type or in conflict with other keys is refused in one line, before anything starts. *needed* marks
keys without a default. The files [jobs/*.yaml](#profiles-jobsyaml) say where a stage runs.

## How values are read

- Numbers are those of YAML 1.2: `1e-4` and `.5` are numbers, `0123` is 123 (octal is `0o123`), `16:00` and `2026-01-01` are text.
  A whole number may be written as `1e6` or `1_000_000`. Truth values are `true` and `false`, or `yes`, `no`, `on` and `off`.
- Where a key takes text, numbers and truth values are text as written: `name: 007` is the name 007, and
  `environment: {OMP_NUM_THREADS: 1}` needs no quotes. `null` means that a key has no value.
- Anchors, aliases and merge keys (`<<: *name`) work. Keys of the file that begin with `x-` are left out: they may hold what
  several sections share, as in `x-shared: &shared {batch_size: 128}`. A key that appears twice in a section is refused.
- When a config is loaded, `~` and `$VARIABLES` (also `${VARIABLES}`) are expanded in every value of the kind *path*, and relative
  paths become absolute: they are relative to the working directory. A variable that is unset or empty is refused. The variables
  of `reader.cache_dir` are those of the node that reads.
- In S3 addresses (`s3://bucket/prefix`) variables are expanded too. Names such as `package:NAME` stay as they are. Addresses with
  another scheme (`gs://`, `file:/`, `s3:/`) are refused.
"""

RENAMED = """## Renamed keys

An older name of a key is read with a warning, and refused from the version of the last column on. In the configs of run folders
and students, which the project itself wrote, it is read for good.

| older name | key | renamed in | refused from |
|---|---|---|---|
"""

PROFILES = "Profiles: jobs/*.yaml"


def document() -> str:
    """The whole page."""
    renamed = [f"| `{key.older}` | `{key.newer}` | {key.since} | {key.until} |" for key in RENAMED_KEYS]
    parts = [INTRODUCTION, RENAMED + "\n".join([*renamed, ""]), _section("The experiment", Config, "")]
    parts += [_section(name, model, f"{name}.") for name, model in _sections(Config)]
    parts.append(_section(PROFILES, Profile, ""))
    parts += [_section(name, model, f"{name}.") for name, model in _sections(Profile)]
    return "\n".join(parts)


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The names and models of the sections of a model, and of their sections, also of those that may be null."""
    for key, field in model.model_fields.items():
        if (section := _model_of(field.annotation)) is not None:
            yield f"{prefix}{key}", section
            yield from _sections(section, f"{prefix}{key}.")


def undescribed() -> list[str]:
    """Keys of the page without a meaning."""
    sections = {f"{name}.": model for name, model in _sections(Config)}
    of_profiles = {f"profile {name}.": model for name, model in _sections(Profile)}
    models = [("", Config), *sections.items(), ("profile ", Profile), *of_profiles.items()]
    return [
        prefix + key
        for prefix, model in models
        for key, field in model.model_fields.items()
        if not (field.description or _is_model(field.annotation))
    ]


def _section(title: str, model: type[BaseModel], prefix: str) -> str:
    rows = [_row(prefix, key, field) for key, field in model.model_fields.items()]
    about = (model.__doc__ or "").strip().partition("\n\n")[0]
    lines = [f"## {title}", "", *([about, ""] if model.__doc__ and model is not Config else [])]
    return "\n".join([*lines, "| key | value | default | what it is |", "|---|---|---|---|", *rows, ""])


def _row(prefix: str, key: str, field: FieldInfo) -> str:
    if _model_of(field.annotation) is not None:
        needed = "needed" if field.is_required() else ""
        anchor = f"{prefix}{key}".replace(".", "")
        about = f"{field.description}; " if field.description else ""
        cells = [f"`{prefix}{key}`", "a section", needed, f"{about}[below](#{anchor})"]
    else:
        value = plain(field.annotation, field.metadata)
        cells = [f"`{prefix}{key}`", value, _default(prefix + key, field), field.description or ""]
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(cell: str) -> str:
    """Table text that neither ends a cell nor looks like HTML."""
    return re.sub(r"[|<]", lambda found: "\\" + found[0], cell)


def _default(key: str, field: FieldInfo) -> str:
    if key == "name":
        return "the file's stem"
    if field.is_required():
        return "*needed*"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def plain(annotation: Any, metadata: typing.Sequence[Any] = (), plural: str = "") -> str:
    """What a value may be, in words: a type with the bounds that pydantic checks; `plural` is "" or "s"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return plain(arguments[0], [*arguments[1:], *metadata], plural)
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not type(None)]
        if {bool, int, float, str} <= set(kinds):
            return "any value"
        words = " or ".join(dict.fromkeys(plain(kind, metadata) for kind in kinds))
        return f"{words} or `null`" if type(None) in arguments else words
    if origin is tuple:
        kind = arguments[0]
        least = next((m.min_length for m in _bounds(metadata) if getattr(m, "min_length", 0)), 0)
        return f"list of {plain(kind, plural='s')}{', not empty' if least else ''}"
    if origin is dict:
        return f"mapping of names to {plain(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = (f"{name}: {plain(f.annotation, f.metadata)}" for name, f in annotation.model_fields.items())
        return f"{{{', '.join(inner)}}}"
    if annotation is Any:
        return "any value"
    if annotation is bool:
        return "true or false"
    if annotation is str:
        return "path" if any(map(_is_path, _bounds(metadata))) else "text"
    assert annotation in (int, float), annotation
    word = "whole number" if annotation is int else "number"
    return " ".join([word + plural, *_range(metadata)])


def _bounds(metadata: typing.Sequence[Any]) -> list[Any]:
    """The single conditions of a field: pydantic keeps some of them within a FieldInfo."""
    return [bound for m in metadata for bound in (_bounds(m.metadata) if isinstance(m, FieldInfo) else [m])]


def _is_path(condition: Any) -> bool:
    return isinstance(condition, AfterValidator) and condition.func.__module__ == paths.__name__


def _range(metadata: typing.Sequence[Any]) -> list[str]:
    words = []
    for bound in _bounds(metadata):
        for name, word in (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "to")):
            limit = getattr(bound, name, None)
            if limit is not None:
                words.append(f"{word} {limit:g}" if limit < 1e6 else f"{word} 2^{limit.bit_length() - 1}")
    return words


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, which may be null; None for other types."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)] or [annotation]
    return kinds[0] if len(kinds) == 1 and _is_model(kinds[0]) else None


if __name__ == "__main__":
    FILE.write_text(document())
    print(f"written: {FILE}")
