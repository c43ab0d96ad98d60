"""Teachers from the snapshots of EDM (Karras et al. 2022) and EDM2 (Karras et al. 2024).

A snapshot is a pickle of modules that carries the source text of their classes; it is read as data, and no text of it is
run (`persistence_pickle`). The classes that it names stand for networks and preconditionings of ours. A state that is
noisier than the network's noisiest level, or cleaner than 0.002, below which EDM never samples, is treated as one at that
level.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from dsno_cluster.closed_pickle import Malformed, shown
from dsno_cluster.diffusion import preconditioning
from dsno_cluster.diffusion.schedule import karras_sigmas, time_of_angle
from dsno_cluster.errors import UserError, closest, said_by
from dsno_cluster.networks.backbones import Backbone, DhariwalNetwork, EDM2Network, SongNetwork
from dsno_cluster.networks.edm_settings import DhariwalSettings, EDM2Settings, SongSettings
from dsno_cluster.persistence_pickle import Module, StoredTensor, read_snapshot
from dsno_cluster.records import first_mistake
from dsno_cluster.storage import read_file
from dsno_cluster.teachers.backbones import KNOTS, levels_of_sigmas, of_scalings
from dsno_cluster.teachers.decoders import MOST_COLOURS
from dsno_cluster.teachers.facts import Facts, number_of_parameters
from dsno_cluster.teachers.identity import EDMIdentity, TeacherIdentity
from dsno_cluster.teachers.teacher import (
    NativeGrid,
    Options,
    Source,
    Teacher,
    TeacherInfo,
    check_options,
    check_schedule,
)
from dsno_cluster.teachers.warm_start import no_unet
from dsno_cluster.weight_files import NotWeights, check_fit, container, is_torch_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    Settings = SongSettings | DhariwalSettings | EDM2Settings
    Precondition = Callable[[Tensor], preconditioning.Scalings]

# between which EDM samples, if the network permits it (Karras et al. 2022, table 1)
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
# The classes of networks in a snapshot, and what describes each of them.
NETWORKS: dict[str, type[SongSettings] | type[DhariwalSettings] | type[EDM2Settings]] = {
    "SongUNet": SongSettings,
    "DhariwalUNet": DhariwalSettings,
    "UNet": EDM2Settings,
}
# The classes of preconditionings in a snapshot, and the networks that each of them may have.
PRECONDITIONINGS = {
    "EDMPrecond": ("SongUNet", "DhariwalUNet"),
    "VPPrecond": ("SongUNet", "DhariwalUNet"),
    "VEPrecond": ("SongUNet", "DhariwalUNet"),
    "iDDPMPrecond": ("SongUNet", "DhariwalUNet"),
    "Precond": ("UNet",),
}
# What the blocks of a network record of themselves that must be as our networks have it.
SAME = {
    "SongUNet": {"skip_scale": math.sqrt(0.5), "adaptive_scale": False, "eps": 1e-6},
    "DhariwalUNet": {"skip_scale": 1.0, "adaptive_scale": True, "eps": 1e-5},
    "UNet": {},
}
# Parts of a network that play no part in sampling: augmentations are for training only.
UNUSED = ("map_augment.weight",)


@dataclass(frozen=True)
class Preconditioned:
    """How a network is used: its coefficients at sigma, the range of sigma that it is used in, and its own levels.

    `native` is the range of EDM's sampler. `levels` fall to 0 at the last of them; None: it knows every sigma.
    """

    scalings: Precondition
    range: tuple[float, float]
    native: tuple[float, float]
    levels: tuple[float, ...] | None = None
    linear_time: bool = False  # in ln sigma

    def of_logsnr(self, level_N: Tensor) -> preconditioning.Scalings:
        """The coefficients for states of ours at log-SNRs."""
        sigma_N = (-0.5 * level_N).exp().clamp(*self.range)
        return preconditioning.of_states(self.scalings(sigma_N), sigma_N)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot as read: its network's `settings` and `tensors`, which still are in the file."""

    info: TeacherInfo
    settings: Settings
    tensors: Mapping[str, StoredTensor]
    use: Preconditioned
    num_bytes: int


class EDMPickle:
    """A snapshot of EDM or EDM2, a pickle (`network-snapshot-*.pkl` and the like)."""

    kind: ClassVar[str] = "EDM"
    identities: ClassVar[tuple[type[TeacherIdentity], ...]] = (EDMIdentity,)

    def __init__(self, source: Source, options: Options) -> None:
        check_options(options, ("schedule",), source.path)
        self.source, self.options = source, options

    @classmethod
    def recognises(cls, source: Source) -> bool:
        if not source.is_file:
            return False
        return container(source.head) == "pickle" and not is_torch_file(source.head)

    def info(self) -> TeacherInfo:
        return self._snapshot.info

    def facts(self) -> Facts:
        snapshot = self._snapshot
        use, identity = snapshot.use, snapshot.info.identity
        assert isinstance(identity, EDMIdentity)
        levels = "every sigma" if use.levels is None else f"{len(use.levels) - 1} levels"
        return Facts(
            f"{identity.network} of {'EDM2' if isinstance(snapshot.settings, EDM2Settings) else 'EDM'}",
            f"F, preconditioned by {identity.preconditioning}",
            levels,
            number_of_parameters(lambda: _build(snapshot.settings)),
            use.range,
            _native(use),
            "heun-edm",
            18 if identity.network == "SongUNet" else 32,
        )

    def load(self, precision: str) -> Teacher:
        import torch

        from dsno_cluster.diffusion.schedule import logsnr

        snapshot, dtype = self._snapshot, getattr(torch, precision)
        assert snapshot.info.shape is not None
        network, channels, use = _network(snapshot, self.source.path), snapshot.info.shape[0], snapshot.use
        network.eval().requires_grad_(False)
        for parameter in network.parameters():  # frequencies and phases stay float32
            parameter.data = parameter.data.to(dtype)

        def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
            k = use.of_logsnr(logsnr(t_N))
            c_skip, c_out, c_in = (c.to(x.dtype)[:, None, None, None] for c in (k.c_skip, k.c_out, k.c_in))
            output = network((c_in * x).to(dtype), k.c_noise.float(), labels)
            x0: Tensor = c_skip * x + c_out * output[:, :channels].to(x.dtype)
            return x0

        return Teacher(snapshot.info, denoise, network)

    def warm_start(self) -> dict[str, Tensor]:
        raise no_unet(self.source.path, self.kind)

    def network_weights(self) -> dict[str, Tensor]:
        return _weights(self._snapshot, self.source.path)

    def forget(self) -> None:
        self.source.forget()
        self.__dict__.pop("_snapshot", None)

    @functools.cached_property
    def _snapshot(self) -> Snapshot:
        path = self.source.path
        data = read_file(path, self.source.endpoint_url)
        try:
            return _read(data, path, check_schedule(self.options.get("schedule", "continuous"), path))
        except Malformed as error:
            raise NotWeights(f"{path}: {error}") from None


def _read(data: bytes, path: str, schedule: str) -> Snapshot:
    """Raises UserError for a snapshot of another network, and Malformed for a damaged one."""
    content = read_snapshot(data, path)
    if not isinstance(outer := content.get("ema"), Module):
        found = ", ".join(shown(str(key)) for key in list(content)[:8]) or "nothing"
        raise UserError(f"{path}: holds no network `ema`, as a snapshot of EDM does; it holds {found}")
    allowed = _known(PRECONDITIONINGS, outer.class_name, path, "preconditioning")
    inner = outer.child("unet") or outer.child("model")
    if inner is None:
        raise UserError(f"{path}: its {outer.class_name} has no network")
    _known(dict.fromkeys(allowed), inner.class_name, path, f"network of {outer.class_name}")
    settings = _settings(inner, path)
    channels = settings.img_channels if isinstance(settings, EDM2Settings) else settings.in_channels
    use = _preconditioned(outer, path)
    out = channels if isinstance(settings, EDM2Settings) else settings.out_channels
    if out != (2 * channels if outer.class_name == "iDDPMPrecond" else channels):
        raise UserError(f"{path}: its network gives {out} channels for images of {channels}")
    size, classes = settings.img_resolution, settings.label_dim
    info = TeacherInfo(
        EDMIdentity(
            sha256=hashlib.sha256(data).hexdigest(),
            preconditioning=outer.class_name,
            network=inner.class_name,
        ),
        (channels, size, size),
        classes,
        classes or None,
        native=_native(use) if schedule == "native" else None,
        has_network=True,
        latent=channels > MOST_COLOURS,
        standardised=channels > MOST_COLOURS,
        backbone=_backbone(settings, use),
    )
    return Snapshot(info, settings, inner.tensors(), use, len(data))


def _backbone(settings: Settings, use: Preconditioned) -> Backbone | None:
    plain = settings.model_copy(update={"dropout": 0.0})
    network = {SongSettings: SongNetwork, DhariwalSettings: DhariwalNetwork, EDM2Settings: EDM2Network}[
        type(settings)
    ](settings=plain)
    knots = 2 if use.linear_time else KNOTS
    return of_scalings(network, use.of_logsnr, levels_of_sigmas(*use.range), knots=knots)


def _known(choices: Mapping[str, Any], name: str, path: str, what: str) -> Any:
    """The choice of that name. Raises UserError that lists them if there is none."""
    if name not in choices:
        near = closest(name, choices)
        raise UserError(
            f"{path}: {name[:80]!r} is no {what} that is known here"
            f"{f'; did it mean {near}?' if near else ''}; known are {', '.join(choices)}"
        )
    return choices[name]


def _settings(network: Module, path: str) -> Settings:
    """What the network records of itself. Raises UserError if that is no network of ours."""
    given, kind = network.state.get("_init_kwargs"), network.class_name
    if network.state.get("_init_args") != () or type(given) is not dict:
        raise UserError(f"{path}: its {kind} does not record its arguments by name")
    heads = {}
    for name, module in network.walk():
        number = module.state.get("num_heads")
        if type(number) is int and number > 0:
            heads[name] = number
        for key, right in SAME[kind].items():
            value = module.state.get(key, right)
            if not isinstance(value, (int, float)) or not math.isclose(value, right, rel_tol=1e-6):
                raise UserError(f"{path}: {name} has {key} {_plain(value)}, a {kind} has {right}")
    try:
        # JSON's types, where a list may stand for a tuple
        return NETWORKS[kind].model_validate({**given, "heads": heads})
    except ValidationError as error:
        raise UserError(f"{path}: its {kind}: {first_mistake(error)}") from None


def _preconditioned(outer: Module, path: str) -> Preconditioned:
    """Raises UserError for values that make no preconditioning."""

    def number(name: str, default: float) -> float:
        value = outer.state.get(name, default)
        if not isinstance(value, (int, float)) or not value > 0:
            raise UserError(
                f"{path}: its {outer.class_name} has {name} {_plain(value)}, not a positive number"
            )
        return float(value)

    lowest = number("sigma_min", 0.0) if outer.state.get("sigma_min", 0) != 0 else 0.0
    highest = number("sigma_max", math.inf)
    native = (max(SIGMA_MIN, lowest), min(SIGMA_MAX, highest))
    if native[0] >= native[1]:
        raise UserError(f"{path}: its {outer.class_name} has sigma_min {lowest} and sigma_max {highest}")
    used = (SIGMA_MIN, highest if math.isfinite(highest) else SIGMA_MAX)
    if outer.class_name in ("EDMPrecond", "Precond"):
        scalings = functools.partial(preconditioning.edm, sigma_data=number("sigma_data", 0.5))
        return Preconditioned(scalings, used, native, linear_time=True)
    if outer.class_name == "VPPrecond":
        beta_d, beta_min, levels = number("beta_d", 19.9), number("beta_min", 0.1), number("M", 1000)
        return Preconditioned(
            functools.partial(preconditioning.vp, beta_d=beta_d, beta_min=beta_min, levels=levels),
            used,
            native,
        )
    if outer.class_name == "VEPrecond":
        return Preconditioned(preconditioning.ve, used, native, linear_time=True)
    u = outer.own_tensors().get("u")
    own = None if u is None or len(u.shape) != 1 or u.shape[0] < 2 else tuple(u.tensor().double().tolist())
    if own is None or own[-1] != 0.0 or any(not a > b for a, b in itertools.pairwise(own)):
        raise UserError(f"{path}: its {outer.class_name} has no levels `u` that fall to 0")
    return Preconditioned(functools.partial(preconditioning.iddpm, levels=own), used, native, own)


def _plain(value: Any) -> str:
    """A value from a file for a message; only the kind of what may be large."""
    return str(value) if isinstance(value, (int, float)) else f"of type {type(value).__name__}"


def _native(use: Preconditioned) -> NativeGrid:
    """The times of EDM's own sampler, then 0: Karras et al. 2022, equation 5, rounded to the network's own levels."""

    def grid(steps: int) -> tuple[float, ...]:
        sigmas = karras_sigmas(steps, *use.native)
        if use.levels is not None:
            levels = use.levels
            sigmas = tuple(min(levels, key=lambda level: abs(level - sigma)) for sigma in sigmas)
            if any(a <= b for a, b in itertools.pairwise(sigmas)):
                raise ValueError(
                    f"{steps} steps, of which some fall on the same of the model's {len(levels) - 1} levels; take fewer"
                )
        return (*(time_of_angle(math.atan(sigma)) for sigma in sigmas), 0.0)

    return grid


def _network(snapshot: Snapshot, path: str) -> nn.Module:
    """The network with its weights, float32. Raises UserError if they do not fit its settings."""
    import torch

    weights = _weights(snapshot, path)
    with torch.device("meta"):
        network = _build(snapshot.settings)
    network.load_state_dict(weights, assign=True)
    if isinstance(snapshot.settings, EDM2Settings):
        from dsno_cluster.networks.edm2_unet import fix_filters

        fix_filters(network)
    return network.to(memory_format=torch.channels_last)


def _build(settings: Settings) -> nn.Module:
    from dsno_cluster.networks.dhariwal_unet import DhariwalUNet
    from dsno_cluster.networks.edm2_unet import EDM2UNet
    from dsno_cluster.networks.song_unet import SongUNet

    if isinstance(settings, SongSettings):
        return SongUNet(settings)
    return EDM2UNet(settings) if isinstance(settings, EDM2Settings) else DhariwalUNet(settings)


def _weights(snapshot: Snapshot, path: str) -> dict[str, Tensor]:
    """The tensors under the names and in the order of our networks, float32.

    Raises UserError if they do not fit the settings, for filters of resampling other than the settings', and for tensors that
    are larger than the file.
    """
    import torch

    from dsno_cluster.networks.edm_layers import per_head, separable_filter

    try:
        with torch.device("meta"):  # so that nothing is allocated before the weights are known to fit
            wanted = _build(snapshot.settings).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{path}: its settings make no network: {said_by('torch', error)}") from None
    if sum(tensor.num_bytes for tensor in snapshot.tensors.values()) > snapshot.num_bytes:
        raise NotWeights(
            f"{path}: has tensors that together are larger than the file: they share their numbers"
        )
    weights = {}
    for name, stored in snapshot.tensors.items():
        if name in UNUSED:
            continue
        tensor = stored.tensor().float()
        layer, _, last = name.rpartition(".")
        if last == "resample_filter":
            right = separable_filter(getattr(snapshot.settings, "resample_filter", (1, 1)))
            if tensor.shape != right.shape or not torch.allclose(tensor, right, atol=1e-6):
                raise UserError(f"{path}: {name} is not the filter of its settings")
            continue
        block, _, inner = layer.rpartition(".")
        if inner in ("qkv", "attn_qkv"):
            heads = snapshot.settings.heads.get(block, 1)
            if tensor.dim() == 0 or tensor.shape[0] % (3 * heads):
                raise UserError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, which {heads} heads do not divide"
                )
            tensor = per_head(tensor, heads)
        weights[name] = tensor
    check_fit(weights, wanted, f"{path}: its weights do not fit its settings")
    return weights
