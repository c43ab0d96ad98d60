"""The type of a stage as `cluster/` sees it; the table in `stages.py` has the entries."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from dsno_cluster.cluster.crew import Crew
from dsno_cluster.cluster.prometheus import progress_exported

if TYPE_CHECKING:
    from dsno_cluster.config import Config, Profile

# ray: the first task drives actors, so the stage survives the loss of another node; ranks: all tasks work in
# step
Kind = Literal["ray", "ranks"]


@dataclass(frozen=True)
class StageOptions:
    """The options of a stage besides its experiment. A stage with its own options has a subclass."""

    @property
    def subject(self) -> str:
        """What the stage works on: two jobs of the same stage and subject do the same work."""
        return ""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths and addresses that the options name."""
        return ()


@dataclass(frozen=True)
class RayOptions(StageOptions):
    """The options of a Ray stage: its number of `actors`, and what each takes of the GPUs (see `Crew`)."""

    actors: int | None = None
    gpus_per_actor: float | None = None

    def crew(self, ray_address: str | None) -> Crew:
        return Crew(self.actors, self.gpus_per_actor, ray_address)


@dataclass(frozen=True)
class SharedOptions(RayOptions):
    """The options of a Ray stage that the tasks of an array may share: `array` of them, each with a Ray of its own.

    `place` is the number of this task, from 0.
    """

    array: int = 1
    place: int = 0


Options = TypeVar("Options", bound=StageOptions)


@dataclass(frozen=True)
class Checked:
    """The result of a check: what the stage `would` do, and what it `found` for a run in this process."""

    would: str
    found: Any = None


@dataclass(frozen=True)
class StageResult:
    """The address of a stage's results, details that its command shows, and the teacher for the next stage."""

    address: str
    details: Any = None
    teacher: Any = None


@dataclass(frozen=True)
class Stage(Generic[Options]):
    """A stage. Its functions are defined in a module, so that a submitted task can be pickled by their names.

    `check(config, options, processes)` raises UserError if the stage lacks something, and says in a sentence
    what it would do in that many processes on this machine. `check_ahead(config, ranks)` raises for problems
    that can be known before the earlier stages are done, and may download weights. `work(config, options,
    ray_address, found)` does the work, and `run` calls it; `found` comes from a check in the same process, or is
    None. `section` is the group of config keys that has the CPU `threads` of an actor, `options` the class of its
    options.
    """

    name: str
    purpose: str
    kind: Kind
    section: str
    options: type[Options]
    check: Callable[[Config, Options, int], Checked]
    check_ahead: Callable[[Config, int], None]
    work: Callable[[Config, Options, str | None, Any], StageResult]

    def run(self, config: Config, options: Options, ray_address: str | None, found: Any) -> StageResult:
        """Do the work, its progress exported. Afterwards its memory on a GPU is there for the next stage, also if it failed."""
        try:
            with progress_exported(config, self.name, _place(options)):
                return self.work(config, options, ray_address, found)
        except BaseException as error:
            _drop_variables(error)
            raise
        finally:
            if "torch" in sys.modules:
                from dsno_cluster.device import give_back_memory

                give_back_memory()


def _place(options: StageOptions) -> int | None:
    """The place of this task in the array that shares the stage, None if it works by itself."""
    return options.place if isinstance(options, SharedOptions) and options.array > 1 else None


def _drop_variables(error: BaseException | None) -> None:
    """Clear the variables of the functions that an error and its causes have left, which its traceback would keep."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@dataclass(frozen=True)
class Submission:
    """A stage of an experiment with what a launcher needs to start it. The config's paths are absolute."""

    stage: Stage[Any]
    config: Config
    profile: Profile
    command_line: str
    options: StageOptions = field(default_factory=StageOptions)

    @property
    def array(self) -> int:
        """The number of tasks that share the stage, each a job of its own; 1: a single job."""
        return self.options.array if isinstance(self.options, SharedOptions) else 1
