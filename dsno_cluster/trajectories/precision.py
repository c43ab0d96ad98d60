"""What the teacher's precision costs in accuracy, and what a faster one would cost and gain."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from dsno_cluster import console
from dsno_cluster.trajectories.plan import (
    LARGE_ERROR,
    Found,
    Plan,
    call_seconds,
    errors_by_time,
    probe_samples,
    seconds_per_evaluation,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dsno_cluster.teachers import Teacher

SHARE = 0.1  # an error below this share of another one does not matter beside it
FAST = "bfloat16"


@dataclass(frozen=True)
class PrecisionCost:
    """Relative error of states by time, against float32 with the same solver, and seconds of one evaluation of one image."""

    precision: str
    compiled: bool
    relative_error: dict[str, float]
    seconds_per_evaluation: float | None = None

    @property
    def name(self) -> str:
        return self.precision + (", compiled" if self.compiled else "")


def with_precision(plan: Plan, precision: str, *, compile: bool) -> Teacher:
    """The plan's teacher in another precision, on CPU."""
    config = plan.teacher.config
    settings = config.teacher.model_copy(update={"precision": precision})
    other = replace(plan.teacher, config=config.model_copy(update={"teacher": settings}))
    return other.load(compile=compile)


def measure_precision(plan: Plan, teacher: Teacher, probes: int) -> PrecisionCost | None:
    """What the config's precision costs on `probes` samples; None if it is float32, not compiled."""
    spec = plan.spec
    if (spec.inference_precision, spec.compiled) == ("float32", False):
        return None
    exact = with_precision(plan, "float32", compile=False).to(teacher.device)
    say(plan, exact, probes)
    return _cost(plan, states_of(plan, teacher, probes), exact, probes)


def measure_faster(plan: Plan, teacher: Teacher, probes: int) -> PrecisionCost | None:
    """What bfloat16 would cost and gain beside a teacher in float32; None if it is not, or has no network for that."""
    if plan.spec.inference_precision != "float32" or not plan.teacher.info.has_network:
        return None
    console.say(f"measuring what teacher.precision={FAST} would cost and gain; its network is compiled first")
    fast = with_precision(plan, FAST, compile=True).to(teacher.device)
    found = _cost(plan, states_of(plan, fast, probes), teacher, probes, FAST, compiled=True)
    return replace(found, seconds_per_evaluation=seconds_per_evaluation(plan, fast))


def say(plan: Plan, exact: Teacher, probes: int) -> None:
    calls = plan.spec.method.evaluations(plan.spec.times)
    noise, labels = probe_samples(plan.spec, exact, probes)
    console.say(
        f"measuring what {plan.spec.inference_precision} costs on {probes} samples (--probes): {2 * calls:,} evaluations of them "
        f"all, about {console.duration(2 * calls * call_seconds(exact, noise, labels))}"
    )


def states_of(plan: Plan, teacher: Teacher, probes: int) -> Tensor:
    """The states of the probe samples by the plan's solver, (N, M, C, H, W)."""
    from dsno_cluster.diffusion.solvers import solve_with

    noise, labels = probe_samples(plan.spec, teacher, probes)
    return solve_with(plan.spec.method, teacher, noise, plan.spec.times, labels)


def _cost(
    plan: Plan,
    states: Tensor,
    exact: Teacher,
    probes: int,
    precision: str | None = None,
    *,
    compiled: bool | None = None,
) -> PrecisionCost:
    from dsno_cluster.diffusion.accuracy import relative_errors

    spec = plan.spec
    errors = relative_errors(states, states_of(plan, exact, probes))
    return PrecisionCost(
        precision or spec.inference_precision,
        spec.compiled if compiled is None else compiled,
        errors_by_time(spec, errors),
    )


def verdict(cost: PrecisionCost, solver_error: dict[str, float] | None) -> str:
    """What the error of a precision means beside the solver's, and beside one that a good student has."""
    errors = cost.relative_error
    if solver_error is not None and all(errors[t] <= SHARE * solver_error[t] for t in errors):
        return "below a tenth of the solver's error at every time point"
    if max(errors.values()) <= SHARE * LARGE_ERROR:
        return f"below a tenth of {LARGE_ERROR:g}, the error of a good student"
    return f"above a tenth of {LARGE_ERROR:g}, the error of a good student: a student may feel it"


def report_precision(chosen: PrecisionCost | None, faster: PrecisionCost | None, found: Found) -> list[str]:
    """The costs as lines for people, beside what else was found."""
    lines, solver_error = [], found.error
    if chosen is not None:
        lines.append(f"precision     {chosen.name}: {_errors(chosen)} (probe samples, against float32)")
        lines.append(f"              this is {verdict(chosen, solver_error)}")
    if faster is not None and faster.seconds_per_evaluation is not None and found.measured is not None:
        seconds = found.measured.seconds_per_evaluation
        lines.append(
            f"note          teacher.precision={faster.precision} takes {faster.seconds_per_evaluation:.3g} s an evaluation here, "
            f"{seconds / faster.seconds_per_evaluation:.2g} times as fast as float32"
        )
        lines.append(f"              {_errors(faster)}: {verdict(faster, solver_error)}")
    return lines


def as_values(
    chosen: PrecisionCost | None, faster: PrecisionCost | None, solver_error: dict[str, float] | None
) -> dict[str, object]:
    """The same as values of JSON: `precision` and `faster_precision`, None if they were not measured."""
    costs = {"precision": chosen, "faster_precision": faster}
    return {
        key: cost and {**asdict(cost), "verdict": verdict(cost, solver_error)} for key, cost in costs.items()
    }


def _errors(cost: PrecisionCost) -> str:
    return "relative error at t: " + ", ".join(f"{t} {value:.2g}" for t, value in cost.relative_error.items())
