"""The student before it was finished: its row of its own evaluation, if that is equal to the one of the finished student."""

from __future__ import annotations

from dataclasses import dataclass

from dsno_cluster import console
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.comparable import setting_differences
from dsno_cluster.evaluation.look_up import Comparison
from dsno_cluster.evaluation.records import Metrics, StudentBefore, read_file
from dsno_cluster.model_folder import StartModel


@dataclass(frozen=True)
class FoundBefore:
    """The row of the student before finishing, or a warning why there is none; neither if a student began as no other."""

    row: StudentBefore | None = None
    warning: str | None = None


def find_before(comparison: Comparison) -> FoundBefore:
    """The row of the student with which the evaluated one began, from `evaluation/<its name>/metrics.json` of the storage.

    It is taken over only if it is of the same weights, by an evaluation with the same settings. If it is not, a line says why.
    """
    start = comparison.subject.student.start
    if start is None:
        return FoundBefore()
    try:
        return FoundBefore(_row(comparison, start))
    except UserError as error:
        warning = f"the table lacks the student before finishing: {error}"
        console.say(f"note: {warning}")
        return FoundBefore(warning=warning)


def _row(comparison: Comparison, start: StartModel) -> StudentBefore:
    """Raises UserError if there is no equal evaluation of the start."""
    if start.name is None:
        raise UserError(f"{start.address} has no name by which its evaluation could be found")
    storage, key = comparison.storage, f"evaluation/{start.name}/metrics.json"
    where, step = f"{storage.url}/{key}", "the student" if start.step is None else f"step {start.step}"
    todo = f"evaluate {step} of {start.name} first, then this one again"
    found = read_file(Metrics, storage, key)
    if found is None:
        raise UserError(f"{where} is missing; {todo}")
    if found.checkpoint.sha256 != start.sha256:
        raise UserError(
            f"{where} is of step {found.checkpoint.step} of {start.name}, not of {step} as it was; {todo}"
        )
    if differing := _differences(found, comparison):
        raise UserError(f"{where} differs from this evaluation in {', '.join(differing)}; {todo}")
    facts = {
        "source": "student before finishing",
        "name": start.name,
        "step": start.step,
        "sha256": start.sha256,
    }
    return StudentBefore.model_validate({**found.student.values(), **facts})


def _differences(found: Metrics, comparison: Comparison) -> list[str]:
    teacher = comparison.subject.teacher.info.identity.model_dump(mode="json")
    another = found.teacher is not None and found.teacher != teacher
    return setting_differences(found, comparison) + (["the teacher"] if another else [])
