"""The teacher that a config names, found once: what is known about it, and its network when needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsno_cluster.config import Config
from dsno_cluster.diffusion.solvers import Method, grid_points
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.networks.backbones import WITHOUT_DROPOUT, Backbone
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.teachers.loading import load_in, open_teacher
from dsno_cluster.teachers.teacher import Teacher, TeacherFamily, TeacherInfo, check_fits
from dsno_cluster.teachers.warm_start import no_network
from dsno_cluster.weight_files import NotWeights

if TYPE_CHECKING:
    from torch import Tensor

_HOW = (
    "point teacher.path at a dsno-cluster model folder (as `dsno-cluster train-teacher` and `import-weights` write it), "
    "a diffusers folder, a state dict of a network that is known here, a published checkpoint, or package.module:function"
)


class NoTeacher(UserError):
    """The config names no teacher, or one that does not exist."""


@dataclass(frozen=True)
class ConfiguredTeacher:
    """A config's teacher. It is passed on after it is found, so that a process reads its files only once.

    `method` is how the config solves its ODE, with its grid decided: the teacher's own steps if the config's
    grid is `auto` and the teacher has any.
    """

    config: Config
    path: str
    opened: TeacherFamily
    info: TeacherInfo
    method: Method

    @property
    def own_steps(self) -> tuple[float, ...] | None:
        """The times of the teacher's own steps if it is solved on those."""
        return None if isinstance(self.method.grid, str) else self.method.grid

    @property
    def compiled(self) -> bool:
        """Whether its network is compiled.

        `auto` is decided without looking at a device: the bytes of a data set, and so its name, depend on it.
        """
        settings = self.config.teacher
        if settings.compile == "auto":
            return self.info.has_network and settings.precision in ("bfloat16", "float16")
        return settings.compile

    def solved_as(self, config: Config) -> ConfiguredTeacher:
        """This teacher, solved as another config that names it says.

        Raises UserError as `find_teacher` does.
        """
        return replace(self, config=config, method=_method(config, self.path, self.info))

    def load(self, *, compile: bool | None = None) -> Teacher:
        """The teacher, on CPU; its network is compiled as the config says, unless `compile` says otherwise.

        Raises UserError if it does not fit the config, and WorkError if its files have changed since it was found.
        """
        loaded = load_in(
            self.config.teacher.precision,
            self._unchanged(),
            compile=self.compiled if compile is None else compile,
        )
        # a factory's images, classes and steps are known only now
        check_fits(self.config.network, loaded.info, self.path)
        if self.config.trajectories.grid == "auto":
            check_planned_grid(loaded, self.method.steps, self.own_steps is not None, self.path)
        return loaded

    def warm_start(self) -> dict[str, Tensor]:
        """The weights that the config's student starts from, as `DSNO.warm_start` takes them.

        Raises UserError if it cannot start from this teacher, and WorkError as `load` does.
        """
        opened = self._unchanged()
        own = self.config.student.backbone == "teacher"
        return opened.network_weights() if own else opened.warm_start()

    def forget(self) -> None:
        """Drop its weights and files from memory; `info` stays, and `load` reads them again."""
        self.opened.forget()

    def _unchanged(self) -> TeacherFamily:
        if self.opened.info().identity != self.info.identity:
            raise WorkError(f"{self.path}: the teacher has changed since this command began")
        return self.opened

    def backbone(self) -> Backbone | DiffusersModel | None:
        """What describes the network that `student.backbone` asks for; None for our U-Net.

        Raises UserError if the teacher has no such network, or the student's form or dropout does not fit it.
        """
        student = self.config.student
        if student.backbone == "unet":
            return None
        if student.backbone == "diffusers":
            if self.info.diffusers is None:
                raise UserError(
                    f"student.backbone diffusers: the teacher at {self.path} ({self.opened.kind}) is no UNet2DModel of "
                    "diffusers on betas; take backbone=teacher or unet"
                )
            return self.info.diffusers
        backbone = self.info.backbone
        if backbone is None:
            raise no_network(self.path, self.opened.kind)
        if backbone.is_transformer and student.operator == "convolution":
            raise UserError(
                f"student.operator convolution: the teacher at {self.path} is a transformer, whose student can only be a series; "
                "set student.operator=series"
            )
        if self.config.network.dropout and isinstance(backbone.network, WITHOUT_DROPOUT):
            raise UserError(
                f"network.dropout {self.config.network.dropout}: the network of the teacher at {self.path} has none; set it to 0"
            )
        return backbone


def check_planned_grid(teacher: Teacher, steps: int, planned: bool, path: str) -> None:
    """Raises UserError if a loaded teacher has steps of its own for grid `auto`, and none were `planned`, or the reverse."""
    if (teacher.native_grid(steps) is not None) != planned:
        raise UserError(
            f"trajectories.grid: auto, but the teacher at {path} has a native_grid, which no plan can know before "
            "it is made; set trajectories.grid to uniform or fine-end"
        )


def find_teacher(config: Config) -> ConfiguredTeacher:
    """The config's teacher, without its network.

    Raises NoTeacher, which says how to get one, if there is none, and UserError if its images, classes or own
    steps are not those of the config, or its own steps are for another solver.
    """
    path = config.teacher.path
    if path is None and config.trajectories.imported is not None:
        raise NoTeacher(
            "teacher.path: none is set, as imported trajectories need none; name the model that made them to compare the student "
            "with it, or measure images by themselves: `dsno-cluster sample --shards URL`, `dsno-cluster eval --samples URL`"
        )
    if path is None:
        raise NoTeacher(f"teacher.path: none is set; {_HOW}")
    try:
        opened = open_teacher(path, config.storage.endpoint_url, config.teacher.options)
        info = opened.info()
    except NotWeights as error:  # it is a teacher, whose weights are damaged
        raise NoTeacher(f"teacher.path: {error}") from None
    except UserError as error:
        raise NoTeacher(f"teacher.path: {error}; {_HOW}") from None
    check_fits(config.network, info, path)
    return ConfiguredTeacher(config, path, opened, info, _method(config, path, info))


def _method(config: Config, path: str, info: TeacherInfo) -> Method:
    """How the config solves this teacher's ODE. Raises UserError if its own steps are not the config's."""
    settings = config.trajectories
    try:
        native = info.native_grid(settings.steps) if settings.grid == "auto" else None
    except ValueError as error:
        raise UserError(f"trajectories.steps: {error}") from None
    if info.distilled and settings.grid != "auto":
        raise UserError(
            f"trajectories.grid: {settings.grid}, but the distilled teacher at {path} knows only the levels of its own "
            "steps; set trajectories.grid=auto"
        )
    if native is not None:
        if info.distilled and settings.solver != "ddim":
            raise UserError(
                f"trajectories.solver: {settings.solver}, but each of the {info.num_steps} steps of the distilled teacher "
                f"at {path} is one DDIM step; set trajectories.solver=ddim"
            )
        if info.num_steps not in (None, settings.steps):
            raise UserError(
                f"trajectories.steps: {settings.steps}, the teacher at {path} has {info.num_steps} steps of its own"
            )
        try:
            grid_points(settings.time_points, settings.solver, settings.steps, native)
        except ValueError as error:
            raise UserError(f"trajectories.times: {error}, which are the own steps of the teacher") from None
    return settings.method.on(native)
