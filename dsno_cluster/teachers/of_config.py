"""The teacher that a config names, found once: what is known about it, and its network when needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsno_cluster.config import Config, TeacherConfig
from dsno_cluster.diffusion.schedule import noise_level
from dsno_cluster.diffusion.solvers import Method, grid_points
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.networks.backbones import WITHOUT_DROPOUT, Backbone
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.teachers.decoders import States, check_same_scale, open_decoder
from dsno_cluster.teachers.identity import weights_sha256
from dsno_cluster.teachers.loading import load_in, open_teacher
from dsno_cluster.teachers.teacher import Teacher, TeacherFamily, TeacherInfo, check_fits, check_guide
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
class ConfiguredGuide:
    """The guide of a config's teacher, found as that is."""

    path: str
    opened: TeacherFamily
    info: TeacherInfo


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
    guide: ConfiguredGuide | None = None

    @property
    def states(self) -> States:
        """What its states are, and what decodes them."""
        return States(self.config.network.state_shape, self.info.decoder, self.info.latent)

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
        precision, compile = self.config.teacher.precision, self.compiled if compile is None else compile
        loaded = load_in(precision, self._unchanged(), compile=compile)
        # a factory's images, classes and steps are known only now
        check_fits(self.config.network, loaded.info, self.path)
        if self.config.trajectories.grid == "auto":
            check_planned_grid(loaded, self.method.steps, self.own_steps is not None, self.path)
        if self.guide is None:
            return loaded
        if self.guide.opened.info().identity != self.guide.info.identity:
            raise WorkError(f"{self.guide.path}: the guide has changed since this command began")
        return loaded.guided_by(_load_guide(precision, self.guide.opened, compile=compile))

    def load_to_train(self) -> Teacher:
        """The teacher by itself, without its guide, in float32 and not compiled, whatever the config says.

        Raises UserError and WorkError as `load`.
        """
        loaded = load_in("float32", self._unchanged(), compile=False)
        check_fits(self.config.network, loaded.info, self.path)
        return loaded

    def network_weights(self) -> dict[str, Tensor]:
        """The state dict of the network that `info.backbone` describes, float32. Raises UserError and WorkError as `load`."""
        return self._unchanged().network_weights()

    def warm_start(self) -> dict[str, Tensor]:
        """The weights that the config's student starts from, as `DSNO.warm_start` takes them.

        Raises UserError if it cannot start from this teacher, and WorkError as `load` does.
        """
        own = self.config.student.backbone == "teacher"
        return self.network_weights() if own else self._unchanged().warm_start()

    def forget(self) -> None:
        """Drop its weights and files from memory; `info` stays, and `load` reads them again."""
        self.opened.forget()
        if self.guide is not None:
            self.guide.opened.forget()

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


def _load_guide(precision: str, opened: TeacherFamily, *, compile: bool) -> Teacher:
    """A guide, compiled as its teacher is if it has a network that can be."""
    return load_in(precision, opened, compile=compile and opened.info().has_network)


def load_of_config(
    settings: TeacherConfig, endpoint_url: str | None, *, precision: str, compile: bool
) -> Teacher:
    """The teacher that a section `teacher` names, with its guide if it has one, on CPU.

    Raises UserError as `load_teacher` and `Teacher.guided_by` do.
    """
    opened = open_teacher(str(settings.path), endpoint_url, settings.options)
    loaded = load_in(precision, opened, compile=compile)
    if settings.guide is None:
        return loaded
    guide = open_teacher(settings.guide, endpoint_url, settings.guide_options)
    return loaded.guided_by(_load_guide(precision, guide, compile=compile))


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
    _check_pinned(config, info, path)
    check_fits(config.network, info, path)
    info = _with_decoder(config, path, info)
    guide = _find_guide(config, info)
    return ConfiguredTeacher(config, path, opened, info, _method(config, path, info), guide)


def _check_pinned(config: Config, info: TeacherInfo, path: str) -> None:
    """Raises UserError if the config pins other weights than the teacher's."""
    pinned, found = config.teacher.sha256, weights_sha256(info.identity)
    if pinned is None:
        return
    if found is None:
        raise UserError(f"teacher.sha256: the teacher at {path} has no weights in files; leave it out")
    if not found.startswith(pinned):
        raise UserError(
            f"teacher.sha256: the config pins {pinned}, the weights of the teacher at {path} have {found}"
        )


def _find_guide(config: Config, teacher: TeacherInfo) -> ConfiguredGuide | None:
    """The guide that the config names. Raises NoTeacher if there is none, and UserError if it does not fit the teacher."""
    settings = config.teacher
    if settings.guide is None:
        return None
    try:
        opened = open_teacher(settings.guide, config.storage.endpoint_url, settings.guide_options)
        info = opened.info()
    except UserError as error:
        raise NoTeacher(f"teacher.guide: {error}") from None
    check_guide(teacher, info, settings.guide)
    if teacher.decoder is not None and info.decoder is not None:
        check_same_scale(info.decoder, teacher.decoder, "teacher.guide")
    return ConfiguredGuide(settings.guide, opened, info)


def _with_decoder(config: Config, path: str, info: TeacherInfo) -> TeacherInfo:
    """What is known of a teacher, with the decoder that the config names.

    Raises UserError if there is none, or the teacher's latents are not those that it decodes.
    """
    if config.teacher.decoder is None:
        return info
    endpoint, channels = config.storage.endpoint_url, config.network.state_channels
    decoder = open_decoder(config.teacher.decoder, endpoint, channels, "teacher.decoder")
    if info.decoder is not None:
        check_same_scale(decoder, info.decoder, "teacher.decoder")
    if info.standardised and decoder.std is None:
        raise UserError(
            f"teacher.decoder: the latents of the teacher at {path} were standardised channel by channel; say the numbers as "
            f"latents_mean and latents_std in config.json of {decoder.folder} (docs/teachers.md)"
        )
    return replace(info, decoder=decoder, latent=True)


def _method(config: Config, path: str, info: TeacherInfo) -> Method:
    """How the config solves this teacher's ODE. Raises UserError if its own steps are not the config's."""
    settings = config.trajectories
    if info.latent and settings.clip_denoised:
        raise UserError(
            f"trajectories.clip_denoised: is for images in [-1, 1], and the states of the teacher at {path} are latents; set it "
            "to false"
        )
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
    method = settings.method.on(native)
    if config.teacher.guide is not None:  # two networks cannot be one batch
        method = replace(method, joint_guidance=False)
    if settings.guidance_interval is not None and not method.guided_evaluations(settings.time_points):
        visited = [noise_level(t) for t in method.visited(settings.time_points)]
        raise UserError(
            f"trajectories.guidance_interval: {list(settings.guidance_interval)} has none of the noise levels at which the "
            f"teacher is evaluated, {len(visited)} from {visited[0]:.4g} to {visited[-1]:.4g}"
        )
    return method
