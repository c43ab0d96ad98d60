"""What `cluster/` knows of a stage: an entry of the table in `stages.py`, which hands it down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from dsno_cluster.config import Config, Profile

# ray: the first task drives actors, so the stage continues without another node; ranks: all tasks work in step
Kind = Literal["ray", "ranks"]


@dataclass(frozen=True)
class StageOptions:
    """What a stage is asked for besides its experiment. A stage with options of its own has a subclass."""

    @property
    def subject(self) -> str:
        """What it works on besides the experiment: two jobs of one stage and subject would do the same work."""
        return ""


Options = TypeVar("Options", bound=StageOptions)


@dataclass(frozen=True)
class Checked:
    """What a check found: what the stage `would` do, in a sentence, and what it `found` for a run in the same process."""

    would: str
    found: Any = None


@dataclass(frozen=True)
class StageResult:
    """Where the results of a stage are, what the command that asked for them shows of them, and what it hands on."""

    address: str
    details: Any = None
    teacher: Any = None


@dataclass(frozen=True)
class Stage(Generic[Options]):
    """A stage. Its functions stand in a module, so that a submitted task names them.

    `check(config, options, processes)` raises UserError for what the stage lacks, and says in a sentence what it would do in
    so many processes on this machine. `check_ahead(config, ranks)` raises for what can be known before the stages before it
    are done, and may download weights. `run(config, options, ray_address, found)` does the work; `found` is that of a check
    in the same process, or None. `section` is the group of the config's keys that has the CPU `threads` of an actor,
    `options` the class of its options.
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
