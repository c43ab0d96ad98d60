"""Keys of the config that were renamed: the one place that knows their older names.

A config that a person wrote may use an older name, with a one-line warning, until the version that no longer
reads it. From then on it is an error that names the new key. What this project wrote itself (the configs of
run folders and students) is read by either name for good.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from dsno_cluster import __version__
from dsno_cluster.errors import UserError


@dataclass(frozen=True)
class RenamedKey:
    """The dotted key `newer`, called `older` before version `since`. Version `until` does not read `older` any more."""

    older: str
    newer: str
    since: str
    until: str


RENAMED_KEYS = (
    RenamedKey("network.image_size", "network.state_size", since="0.2.0", until="1.0.0"),
    RenamedKey("network.channels", "network.state_channels", since="0.2.0", until="1.0.0"),
)


def by_older_name(key: str) -> RenamedKey | None:
    """The renamed key whose older name is the dotted `key`."""
    return next((renamed for renamed in RENAMED_KEYS if renamed.older == key), None)


def with_current_names(values: dict[str, Any]) -> tuple[dict[str, Any], list[RenamedKey]]:
    """A copy of `values`, a config as nested mappings, with the current names of its keys; and those that it renamed.

    Raises UserError if a key is set by both names.
    """
    values, found = copy.deepcopy(values), []
    for key in RENAMED_KEYS:
        older_section, older = _place(values, key.older)
        if older_section is None or older not in older_section:
            continue
        section, newer = _place(values, key.newer, make=True)
        if section is None or newer in section:
            raise UserError(
                f"{key.older} is the older name of {key.newer}, which is set too; remove {key.older}"
            )
        section[newer] = older_section.pop(older)
        found.append(key)
    return values, found


def _place(values: dict[str, Any], key: str, *, make: bool = False) -> tuple[dict[str, Any] | None, str]:
    """The section of a dotted key, None if there is none, and the key's last part. `make` makes missing sections."""
    *sections, last = key.split(".")
    for name in sections:
        inner = values.setdefault(name, {}) if make else values.get(name)
        if not isinstance(inner, dict):
            return None, last
        values = inner
    return values, last


def warning(key: RenamedKey) -> str:
    """What a person reads who used the older name. Raises UserError if this version does not read it any more."""
    renamed = f"{key.older} is called {key.newer} since version {key.since}"
    if _numbers(__version__) >= _numbers(key.until):
        raise UserError(f"{renamed}, and its older name is not read any more; rename it")
    return f"{renamed}; the older name is read until {key.until}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
