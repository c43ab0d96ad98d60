"""YAML text to plain values, and back.

Numbers are those of YAML 1.2 (its core schema): 0123 is 123, 1e-4 is a number, 16:00 and 2026-01-01 are text.
Truth values may also be written as in YAML 1.1: yes, no, on, off. Keys are text, as written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from dsno_cluster.errors import UserError

_TAG = "tag:yaml.org,2002:"
# kind of a plain scalar, what it looks like, and its first letters
_SCALARS = (
    ("bool", "true|yes|on|false|no|off", "tTyYoOfFnN"),
    ("null", "~|null|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-f]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
    ("merge", "<<", "<"),
)
_TRUE = ("true", "yes", "on")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - without those of YAML 1.1


class _Dumper(yaml.SafeDumper):
    """Puts in quotes each text that either version of YAML would read as something else."""


for _kind, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$", re.IGNORECASE), _first)


@dataclass(frozen=True)
class Written:
    """A number or a truth value, with the text that was written for it."""

    text: str
    value: bool | int | float


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UserError, naming `where`, if the text is not YAML."""
    return _values_only(parse_written(text, where))


def parse_written(text: str, where: str) -> Any:
    """As `parse_yaml`; a number or a truth value is `Written`: where text is asked for, it is text as it stands."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _value(node, ())
    except yaml.MarkedYAMLError as error:
        line = f" on line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}: not YAML: {error.problem}{line}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def dump_yaml(values: Any, *, only_ascii: bool = True) -> str:
    """Plain values as YAML text, which `parse_yaml` reads back to equal ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=not only_ascii)


def _value(node: yaml.Node, around: tuple[yaml.Node, ...]) -> Any:
    """The value of a node inside the nodes `around`."""
    if any(node is outer for outer in around):
        raise _wrong(node, "an anchor that contains itself")
    kind = node.tag.removeprefix(_TAG)
    match node:
        case yaml.ScalarNode():
            return _scalar(node, kind)
        case yaml.SequenceNode() if kind == "seq":
            return [_value(item, (*around, node)) for item in node.value]
        case yaml.MappingNode() if kind == "map":
            return _mapping(node, (*around, node))
    raise _wrong(node, f"the tag {node.tag} is not known here")


def _mapping(node: yaml.MappingNode, around: tuple[yaml.Node, ...]) -> dict[str, Any]:
    """A mapping; its own keys take precedence over those that `<<` merges into it."""
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key, value in node.value:
        if key.tag == _TAG + "merge":
            found = _value(value, around)
            for source in found if isinstance(found, list) else [found]:
                if not isinstance(source, dict):
                    raise _wrong(value, "<< takes a mapping, or a list of mappings")
                merged = source | merged
        elif not isinstance(key, yaml.ScalarNode):
            raise _wrong(key, "a key is not plain text")
        elif key.value in own:
            raise _wrong(key, f"key {key.value!r} appears twice")
        else:
            own[key.value] = _value(value, around)
    return merged | own


def _scalar(node: yaml.ScalarNode, kind: str) -> Any:
    text = str(node.value)
    digits = text.lower().replace("_", "")
    try:
        match kind:
            case "str" | "merge":
                return text
            case "null":
                return None
            case "bool":
                return Written(text, digits in _TRUE)
            case "int":
                base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
                return Written(text, int(digits, base))
            case "float":
                return Written(text, float(digits.replace(".inf", "inf").replace(".nan", "nan")))
    except ValueError as error:  # an explicit tag, such as !!int x, or thousands of digits
        raise _wrong(node, f"{text[:40]!r}: {error}") from None
    raise _wrong(node, f"the tag {node.tag} is not known here")


def _wrong(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, node.start_mark)


def _values_only(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _values_only(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_values_only(item) for item in found]
    return found.value if isinstance(found, Written) else found
