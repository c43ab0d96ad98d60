"""The commands of single teachers: inspect-teacher, fetch-teacher."""

from __future__ import annotations

from typing import Any

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.errors import UserError


def inspect_teacher(arguments: Arguments) -> None:
    if len(arguments.words) != 1:
        raise UserError(
            "name one PATH: a teacher's file, folder or address; its options are written key=value"
        )
    from dsno_cluster.teachers.inspection import as_json, inspect_teacher, report

    path, options = arguments.words[0], arguments.options
    found = inspect_teacher(path, teacher_options(arguments.overrides), options.endpoint_url)
    print(as_json(found) if options.json else report(found))


def teacher_options(words: list[str]) -> dict[str, Any]:
    """The teacher options of words key=value, the values read as YAML."""
    from dsno_cluster.yaml_text import parse_yaml

    pairs = (word.partition("=") for word in words)
    return {key.removeprefix("teacher.options."): parse_yaml(text, f"{key}={text}") for key, _, text in pairs}


def fetch_teacher(arguments: Arguments) -> None:
    what = "NAME: OWNER/NAME of a repository on the Hugging Face hub, the name of a published file, or a URL"
    name = arguments.only_word(what)
    from dsno_cluster import console
    from dsno_cluster.teachers.fetching import fetch_teacher, section_text

    options = arguments.options
    path, section = fetch_teacher(name, options.revision, options.out)
    print(section_text(section))
    console.say(
        f"fetched: {path}; `dsno-cluster inspect-teacher {path}` prints the other sections of a config"
    )
