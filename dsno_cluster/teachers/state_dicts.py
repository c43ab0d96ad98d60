"""Teachers from state dicts: OpenAI's U-Nets (guided- and improved-diffusion, consistency models' teachers), DiT and SiT.

The sizes of the network are read from the shapes of its tensors. What shapes cannot say, the options do; a network whose
sizes are those of a published model needs none.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

from dsno_cluster.errors import UserError
from dsno_cluster.teachers.facts import Facts
from dsno_cluster.teachers.identity import (
    ADMIdentity,
    DiTIdentity,
    OpenAIEDMIdentity,
    SiTIdentity,
    TeacherIdentity,
)
from dsno_cluster.teachers.state_dict_file import Reading, is_state_dict, read_state_dict
from dsno_cluster.teachers.teacher import Options, Source, Teacher, TeacherInfo, check_options
from dsno_cluster.teachers.warm_start import no_unet

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = (
    *("family", "num_heads", "num_head_channels", "new_attention_order", "beta_schedule", "diffusion_steps"),
    *("rescale_timesteps", "predict_xstart", "image_size", "schedule", "timestep_respacing"),
)


class StateDictFile:
    """A file of `torch.save` that holds the state dict of one of these networks."""

    kind: ClassVar[str] = "state dict"
    identities: ClassVar[tuple[type[TeacherIdentity], ...]] = (
        *(ADMIdentity, OpenAIEDMIdentity, DiTIdentity, SiTIdentity),
    )

    def __init__(self, source: Source, options: Options) -> None:
        check_options(options, OPTIONS, source.path)
        self.source, self.options = source, options

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return is_state_dict(source)

    def info(self) -> TeacherInfo:
        return self._reading.info

    def facts(self) -> Facts:
        return self._reading.facts

    def load(self, precision: str) -> Teacher:
        import torch

        network, denoise = self._reading.build(getattr(torch, precision))
        return Teacher(self.info(), denoise, network)

    def warm_start(self) -> dict[str, Tensor]:
        raise no_unet(self.source.path, self.kind)

    def network_weights(self) -> dict[str, Tensor]:
        import torch

        network, _ = self._reading.build(torch.float32)
        return network.state_dict()

    def forget(self) -> None:
        self.source.forget()
        self.__dict__.pop("_reading", None)

    @functools.cached_property
    def _reading(self) -> Reading:
        from dsno_cluster.teachers import openai_shapes, openai_unets, transformers

        state = read_state_dict(self.source)
        if openai_shapes.recognises(state.tensors):
            return openai_unets.read(state, self.options)
        if transformers.recognises(state.tensors):
            return transformers.read(state, self.options)
        first = ", ".join(list(state.tensors)[:3])
        raise UserError(
            f"{self.source.path}: is the state dict of a network that is not known here (it begins with {first}); known are "
            "the U-Nets of guided-diffusion, improved-diffusion and consistency_models, DiT and SiT"
        )
