"""The type of a stage as `cluster/` sees it; the table in `stages.py` has the entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

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
    that can be known before the earlier stages are done, and may download weights. `run(config, options,
    ray_address, found)` does the work; `found` comes from a check in the same process, or is None. `section`
    is the group of config keys that has the CPU `threads` of an actor, `options` the class of its options.
    """

    name: str
    purpose: str
    kind: Kind
    section: str
    options: type[Options]
    check: Callable[[Config, Options, int], Checked]
    check_ahead: Callable[[Config, int], None]
    run: Callable[[Config, Options, str | None, Any], StageResult]


@dataclass(frozen=True)
class Submission:
    """A stage of an experiment with what a launcher needs to start it. The config's paths are absolute."""

    stage: Stage[Any]
    config: Config
    profile: Profile
    command_line: str
    options: StageOptions = field(default_factory=StageOptions)
