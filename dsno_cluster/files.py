"""Files of this machine: how their paths are shown."""

from __future__ import annotations

from pathlib import Path


def shown_path(path: str | Path) -> str:
    """A path or address as people read it: what lies below the working directory without that."""
    try:
        below = Path(path).relative_to(Path.cwd())
    except (ValueError, OSError):  # elsewhere, an address; or the working directory was deleted
        return str(path)
    return str(below)
