"""A trainable copy of a teacher: the fake score network of distribution matching (Yin et al. 2024b, *Improved Distribution
Matching Distillation*, sections 3 and 4), whose middle features a discriminator judges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dsno_cluster.errors import UserError
from dsno_cluster.networks.backbones import EDM2Network
from dsno_cluster.networks.discriminator import DiscriminatorHead
from dsno_cluster.networks.dropout import DropoutSwitch
from dsno_cluster.networks.edm2_unet import train_filters
from dsno_cluster.networks.middle import middle_of
from dsno_cluster.networks.trainable import give_weights_an_axis, keep_constants_out
from dsno_cluster.networks.unet import UNet
from dsno_cluster.teachers.factories import Factory
from dsno_cluster.teachers.of_config import ConfiguredTeacher
from dsno_cluster.teachers.teacher import Teacher
from dsno_cluster.teachers.unet_denoiser import denoiser


class FakeScore(DropoutSwitch):
    """A teacher's denoiser, trainable, with a discriminator head on its middle features.

    It takes over the network of `teacher`, which must be one that `middle_of` knows. Its state consists of weights only, below
    `network.` and `head.`, each contiguous and with an axis; what the network keeps besides, such as frequencies, is constant.
    It has no dropout, in training mode either. `seed` is that of the head's first weights.
    """

    def __init__(self, teacher: Teacher, seed: int) -> None:
        super().__init__()
        assert teacher.network is not None
        found = middle_of(teacher.network)
        assert found is not None
        middle, channels = found
        self._teacher = teacher
        self.network = teacher.network
        give_weights_an_axis(self.network)
        keep_constants_out(self.network)
        self.network.to(memory_format=torch.contiguous_format)  # DeepSpeed flattens weights as they lie
        with _drawing_from(seed):
            self.head = DiscriminatorHead(channels)
        self._features: Tensor | None = None
        middle.register_forward_hook(self._keep)
        self.without_dropout().requires_grad_(True)  # whatever the teacher was trained with

    def forward(self, x_NCHW: Tensor, t_N: Tensor, labels_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noisy states (N, C, H, W) at cosine times (N,), float64 -> clean x0 (N, C, H, W) and logits (N, L), both float32.

        L is the number of pixels or tokens of the middle features. Both results are differentiable in x and in the weights; a
        loss of either of them gives every weight a gradient, of zeros if the loss does not depend on it. Labels are as for
        `Teacher`. Raises ValueError if they are missing or not wanted.
        """
        labels_N = self._teacher.labels_or_null(labels_N, len(x_NCHW))
        there = None if labels_N is None else labels_N.to(x_NCHW.device)
        x0_NCHW = self._teacher.denoise(x_NCHW, t_N, there)
        features, self._features = self._features, None
        assert features is not None
        both: tuple[Tensor, Tensor] = _Together.apply(x0_NCHW.float(), self.head(features))
        return both

    def answers_with_gradients(self, x_NCHW: Tensor, labels_N: Tensor | None) -> bool:
        """Whether x0 comes from the network, and has gradients."""
        t_N = torch.full((len(x_NCHW),), 0.5, dtype=torch.float64)
        x0_NCHW = self._teacher.denoise(x_NCHW, t_N, labels_N)
        features, self._features = self._features, None
        return features is not None and x0_NCHW.requires_grad

    def __deepcopy__(self, memo: Any) -> FakeScore:
        raise TypeError(
            "a FakeScore cannot be copied: its denoiser would go on using the weights of this one"
        )

    def _keep(self, _middle: nn.Module, _inputs: Any, output: Any) -> None:
        """Note the middle's output; a block of diffusers' encoder returns its skips with it."""
        self._features = output[0] if isinstance(output, tuple) else output


class _Together(torch.autograd.Function):
    """The identity of several tensors, of which each gets a gradient as soon as one does: zeros if the loss does not use it.

    So every weight gets a gradient, on every rank. DeepSpeed's ZeRO 3 also gathers the weights of a block for the backward
    pass only if a gradient comes through the output that it wraps, and the features of the middle are read before that.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def trainable_copy(teacher: ConfiguredTeacher, seed: int) -> FakeScore:
    """A copy of the config's teacher, float32 and not compiled, which answers as the teacher does until it is trained.

    In place of a teacher without a network that is known here (a closed form, some functions of users) it is our U-Net of the
    config's `network`, with new weights drawn from `seed`, which has yet to learn. Raises UserError if that section lacks
    sizes, if a function returns the same network again or answers without gradients, and as `ConfiguredTeacher.load` does.
    """
    loaded = teacher.load_to_train()
    if loaded.network is None or middle_of(loaded.network) is None:
        return FakeScore(_new_denoiser(teacher, loaded, seed), seed)
    if isinstance(teacher.opened, Factory):
        _check_own_network(teacher, loaded)
    if teacher.info.backbone is not None and isinstance(teacher.info.backbone.network, EDM2Network):
        train_filters(loaded.network, teacher.network_weights())
    copy = FakeScore(loaded, seed)
    if isinstance(teacher.opened, Factory):
        _check_differentiable(copy, teacher)
    return copy


def _new_denoiser(teacher: ConfiguredTeacher, loaded: Teacher, seed: int) -> Teacher:
    """Our U-Net, which predicts v on the cosine schedule, for the states and classes of a teacher."""
    network = teacher.config.network
    if network.missing_sizes:
        raise UserError(
            f"network: the {teacher.opened.kind} teacher at {teacher.path} has no network that can be copied; a U-Net is trained "
            f"in its place, which needs {', '.join(network.missing_sizes)}"
        )
    with _drawing_from(seed):
        unet = UNet(network.model_copy(update={"dropout": 0.0}))
    return replace(loaded, denoise=denoiser(unet, "v", torch.float32), network=unet)


@contextlib.contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """In this context weights on the CPU are drawn from a seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _check_own_network(teacher: ConfiguredTeacher, loaded: Teacher) -> None:
    """Raises UserError if a user's function returns a network that others use too."""
    if teacher.load_to_train().network is loaded.network:
        raise UserError(
            f"teacher.path: {teacher.path} returns the same network at each call, and training would change the teacher; return "
            "a new one each time"
        )


def _check_differentiable(copy: FakeScore, teacher: ConfiguredTeacher) -> None:
    """Raises UserError if what a user's function returns does not compute by its network, with gradients."""
    states = torch.zeros(1, *teacher.config.network.state_shape)
    labels = torch.zeros(1, dtype=torch.int64) if teacher.config.network.num_classes else None
    if not copy.answers_with_gradients(states, labels):
        raise UserError(
            f"teacher.path: what {teacher.path} returns has a network, but does not compute x0 by it with gradients, which the "
            "copy needs to be trained; leave out torch.no_grad, and detach nothing"
        )
