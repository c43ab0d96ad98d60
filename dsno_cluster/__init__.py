"""dsno-cluster: teacher trajectories, DSNO training and evaluation, on a laptop or a Slurm cluster.

The Python interface: `load_teacher`, `solve`, `count_evaluations` and `load_student`. Importing this package
is cheap; torch is imported when one of them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

__all__ = ["__version__", "count_evaluations", "load_student", "load_teacher", "solve"]

if TYPE_CHECKING:
    from dsno_cluster.diffusion.solvers import count_evaluations, solve
    from dsno_cluster.students.dsno import load_student
    from dsno_cluster.teachers import load_teacher

_HOMES = {
    "load_student": "dsno_cluster.students.dsno",
    "load_teacher": "dsno_cluster.teachers",
    "count_evaluations": "dsno_cluster.diffusion.solvers",
    "solve": "dsno_cluster.diffusion.solvers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dsno_cluster' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
