"""Config keys of the networks: network, teacher, student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dsno_cluster.config.base import BelowOne, Named, PositiveInt, Precision, Sha256Start, Strict, renamed
from dsno_cluster.config.paths import StorageRoot, TeacherPath, is_file_path, resolved

UNET_SIZES = ("width", "multipliers", "blocks_per_level", "embedding_dim")


class Network(Named):
    """The states, and our U-Net: the student's, and that of a teacher that is trained here or imported."""

    state_size: PositiveInt | tuple[PositiveInt, PositiveInt] = renamed(
        "state_size",
        "image_size",
        description="height and width of a state: of an image in pixels, or of a latent; [height, width] if they differ",
    )
    state_channels: PositiveInt = renamed(
        "state_channels",
        "channels",
        description="channels of a state: colours of an image, or channels of a latent",
    )
    num_classes: Annotated[int, Field(ge=0)] = Field(
        0, description="number of classes to condition on; 0: none"
    )
    null_class: bool = Field(
        False, description="whether there is one more class that means 'no label', for guidance"
    )
    width: PositiveInt | None = Field(
        None, description="channels of the first level, a multiple of 32; needed with student.backbone=unet"
    )
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = Field(
        None,
        description="width of each level, as a multiple of `width`; each further level halves the state; needed with "
        "student.backbone=unet",
    )
    blocks_per_level: PositiveInt | None = Field(
        None, description="residual blocks of each level; needed with student.backbone=unet"
    )
    attention_resolutions: tuple[PositiveInt, ...] = Field(
        (), description="heights of the levels with attention; the middle always has attention"
    )
    heads: PositiveInt = Field(1, description="attention heads; ignored if head_dim is set")
    head_dim: PositiveInt | None = Field(None, description="channels of an attention head")
    embedding_dim: PositiveInt | None = Field(
        None,
        description="channels of the embedding of noise level and class; needed with student.backbone=unet",
    )
    dropout: BelowOne = Field(
        0.0,
        description="share of activations left out in training, except with training.objective=distribution",
    )

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.state_channels, *self.sides

    @property
    def sides(self) -> tuple[int, int]:
        """(H, W)."""
        return self.state_size if isinstance(self.state_size, tuple) else (self.state_size, self.state_size)

    def level_heights(self, levels: int) -> list[int]:
        """The heights of the states at each level of a U-Net, by which `attention_resolutions` names levels."""
        return [self.sides[0] // 2**i for i in range(levels)]

    @property
    def class_slots(self) -> int:
        return self.num_classes + int(self.null_class)

    @property
    def missing_sizes(self) -> list[str]:
        """The sizes that our U-Net needs and that are not set."""
        return [name for name in UNET_SIZES if getattr(self, name) is None]

    @field_validator("state_size")
    @classmethod
    def _one_side_of_a_square(cls, size: int | tuple[int, int]) -> int | tuple[int, int]:
        return size[0] if isinstance(size, tuple) and size[0] == size[1] else size

    @model_validator(mode="after")
    def _fits_together(self) -> Network:
        width, multipliers = self.width, self.multipliers
        if width is not None and width % 32:
            raise ValueError(f"width {width} is not a multiple of 32, the groups of the group norms")
        if multipliers is not None:
            if any(side % 2 ** (len(multipliers) - 1) for side in self.sides):
                shown = "x".join(map(str, dict.fromkeys(self.sides)))
                raise ValueError(f"state_size {shown} cannot be halved {len(multipliers) - 1} times")
            sizes = self.level_heights(len(multipliers))
            for multiplier, size in zip(multipliers, sizes, strict=True):
                attends = size in self.attention_resolutions or size == sizes[-1]  # the middle always does
                if width is not None and attends and (width * multiplier) % (self.head_dim or self.heads):
                    raise ValueError(f"{width * multiplier} channels do not divide into the attention heads")
            if not set(self.attention_resolutions) <= set(sizes):
                raise ValueError(
                    f"attention_resolutions {list(self.attention_resolutions)} are not all among {sizes}"
                )
        if self.null_class and not self.num_classes:
            raise ValueError("null_class needs num_classes above 0")
        return self


PlainValue = bool | int | float | str | None
TeacherOptions = dict[str, PlainValue | tuple[Any, ...]]


class TeacherConfig(Strict):
    path: TeacherPath | None = Field(
        None,
        description="folder or address of a teacher, package:NAME for one that ships with the package, "
        "package.module:function, "
        "closed-form:gaussian or closed-form:mixture",
    )
    decoder: StorageRoot | None = Field(
        None,
        description="folder or address of the AutoencoderKL that turns the teacher's states, latents, into images (or of a "
        "pipeline that has one); null: that of the teacher's own pipeline, or the states are images. It does not change "
        "trajectories",
    )
    sha256: Sha256Start | None = Field(
        None,
        description="sha256 of the teacher's weights, or its first 8 or more digits, as `inspect-teacher` and `fetch-teacher` "
        "print it: others are refused; null: not checked",
    )
    precision: Precision = Field(
        "float32",
        description="precision of the network's weights and layers; states stay float32. tf32: float32 whose matrix products "
        "and convolutions a GPU computes from inputs of 10 bits",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="whether the network is compiled with torch.compile; the trajectories are then another data set. auto: in "
        "bfloat16 and float16, whatever the device. The first shard waits for it, for a minute or more; the kernels are kept "
        "in kernels/ below run.dir",
    )
    options: TeacherOptions = Field(
        default_factory=dict,
        description="options of this kind of teacher (docs/teacher-files.md), e.g. {schedule: native, null_class: 10}",
    )
    guide: TeacherPath | None = Field(
        None,
        description="a second, weaker teacher of the same states, from which trajectories.guidance_scale leads away "
        "(autoguidance); it has the same classes, or none; null: classifier-free guidance",
    )
    guide_options: TeacherOptions = Field(
        default_factory=dict, description="options of the guide, as `options` are those of the teacher"
    )

    @field_validator("options", "guide_options")
    @classmethod
    def _published_config(cls, options: TeacherOptions, info: ValidationInfo) -> TeacherOptions:
        """Resolve `config`, the path of a published teacher's YAML; a factory's options stay."""
        of = "path" if info.field_name == "options" else "guide"
        path, config = info.data.get(of), options.get("config")
        if path is None or not is_file_path(path) or not isinstance(config, str):
            return options
        return {**options, "config": resolved(config, info)}

    @model_validator(mode="after")
    def _fits_together(self) -> TeacherConfig:
        if self.guide is not None and self.path is None:
            raise ValueError("guide needs a teacher that it guides: set path")
        if self.guide_options and self.guide is None:
            raise ValueError("guide_options are those of a guide, and none is set")
        return self


def too_many_modes(operator: str, modes: int, points: int) -> str | None:
    """What is wrong with this number of modes, or None: M = `points` time points do not determine more."""
    most, formula = (points, "M") if operator == "series" else (points // 2 + 1, "M//2+1")
    return f"modes {modes} is above {most} = {formula} for M={points} time points" if modes > most else None


class StudentConfig(Named):
    backbone: Literal["unet", "teacher", "diffusers"] = Field(
        "unet",
        description="unet: our U-Net, as `network` describes it; teacher: the teacher's own network, of any family; diffusers: "
        "the teacher's UNet2DModel as earlier versions used it, without its last layer if it predicts noise",
    )
    operator: Literal["convolution", "series"] = Field(
        "convolution",
        description="convolution: the backbone is evaluated at M time points, which temporal convolutions mix (published); "
        "series: it is evaluated once, and its last layer gives a cosine series in time",
    )
    modes: Annotated[int, Field(ge=0)] = Field(
        2,
        description="convolution: Fourier modes that the temporal convolutions keep, at most M//2+1 (0: no such layers); "
        "series: its terms, 1 to M",
    )
    prediction: Literal["state", "data"] = Field(
        "state",
        description="what the last layer gives; state: x_t itself (published); data: F in x_t = alpha_t F + sigma_t noise",
    )
    points: Literal["all", "drawn"] = Field(
        "all",
        description="time points that the convolutions see in a training step; all: all of them together (published); "
        "drawn: some, "
        "often only t=0, so that a sample costs one evaluation of the backbone",
    )
    temporal_init: Literal["published", "zero"] = Field(
        "zero",
        description="initialisation of the temporal convolutions; zero: they begin as the identity; published: the paper's",
    )
    warm_start: bool = Field(True, description="start from the teacher's weights")

    @model_validator(mode="after")
    def _fits_together(self) -> StudentConfig:
        if self.operator == "series" and self.modes == 0:
            raise ValueError("modes 0: a series needs one term or more")
        if self.operator == "series" and self.points == "drawn":
            raise ValueError("points drawn is for operator convolution; a series gives all points at once")
        return self
