"""`train-teacher`: trains a small denoiser on real images (v-prediction, cosine schedule, one process)."""

from __future__ import annotations

import contextlib
import io
import math
import time

import torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import Config, Network, TeacherTraining, dump_config, validate
from dsno_cluster.config.base import Named, later
from dsno_cluster.data import DATA_SETS, Split
from dsno_cluster.device import allow_tf32, compute_device, copied_to
from dsno_cluster.diffusion.schedule import alpha_sigma, logsnr
from dsno_cluster.errors import UserError
from dsno_cluster.model_folder import AboutModel, ModelDescription, write_model
from dsno_cluster.networks.unet import UNet
from dsno_cluster.records import Values, canonical_hash
from dsno_cluster.storage import FolderStorage, MissingObject, open_storage
from dsno_cluster.teachers.identity import UNetDescription
from dsno_cluster.torch_internals import lerp_all
from dsno_cluster.training.optim import ema_decay_at, learning_rate
from dsno_cluster.training.ownership import only_run, teacher_claim
from dsno_cluster.training.real_images import RealImages, real_images
from dsno_cluster.weight_files import NotWeights, parse_torch

OF_RUN = ("seed", "network", "images")  # what identifies a run besides the keys of teacher_training
MOST_BYTES = 2**32  # the images are all kept on the device, and take at most so many bytes
SHOWN_EVERY = 10  # steps: to show the loss, a GPU must be waited for


class TeacherRun(Named):
    """The values that identify a run: if one differs, the resume state must not be continued.

    `images` is the identity of those of `data.images`; None for data that has a name.
    """

    seed: int
    network: Network
    training: TeacherTraining
    images: str | None = later(None)

    def differing(self, other: TeacherRun) -> list[str]:
        """The keys of the config in which two runs differ."""
        found = [key for key in OF_RUN if getattr(self, key) != getattr(other, key)]
        of_training = TeacherTraining.model_fields
        found += [k for k in of_training if getattr(self.training, k) != getattr(other.training, k)]
        return sorted(found)


def train_teacher(config: Config, command: str) -> str:
    """Train and write `<storage.root>/teachers/<name>/`; returns its address.

    An interrupted run is continued. Raises UserError if the config names no data, its shape is not the network's, or the
    name belongs to another training, and WorkError if another process continues the same one.
    """
    real = _checked_images(config)
    with only_run(config.run_dir / "teachers", f".{config.name}.lock"):
        return _train(config, real, command)


def _train(config: Config, real: RealImages, command: str) -> str:
    """`train_teacher` on checked data, undisturbed."""
    network, settings = config.network, config.teacher_training
    folder = f"teachers/{config.name}/"
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    run = TeacherRun(
        seed=config.seed,
        network=network,
        training=settings,
        images=None if config.data.images is None else real.identity,
    )
    claim = teacher_claim(config, canonical_hash(run.model_dump(mode="json")), storage)
    claim.hold()
    # beside the model's folder, which appears complete
    resume, resume_key = FolderStorage(config.run_dir), f"teachers/{config.name}-resume.pt"
    device = compute_device()
    allow_tf32(settings.precision == "tf32")
    data = _on_device(real, device)
    torch.manual_seed(config.seed)
    unet = UNet(network).to(device)
    ema = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    optimizer = torch.optim.Adam(unet.parameters())
    start, seconds = 0, 0.0
    with contextlib.suppress(MissingObject):
        start, seconds = _load_resume_state(run, resume, resume_key, unet, optimizer, ema)

    parameters = sum(p.numel() for p in unet.parameters())
    console.say(
        f"teacher: {parameters / 1e6:.2f} M parameters, steps {start} to {settings.steps}, batch {settings.batch_size}"
    )
    began, shown = time.perf_counter() - seconds, start
    with console.progress("training the teacher", settings.steps, "steps", done=start) as advance:
        for step in range(start, settings.steps):
            rate = learning_rate(step, settings.steps, settings.lr, settings.warmup, "cosine")
            for group in optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed((config.seed << 31) + step)  # for dropout, the same after an interruption
            loss = velocity_loss(unet, data, config, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay = ema_decay_at(step, settings.ema_decay, ramp=True)
            lerp_all(list(ema.values()), list(unet.state_dict().values()), 1.0 - decay)
            if (step + 1) % SHOWN_EVERY == 0 or step + 1 == settings.steps:
                advance(step + 1 - shown, loss=float(loss.detach()))
                shown = step + 1
            if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
                state = _resume_state(run, unet, optimizer, ema, step + 1, time.perf_counter() - began)
                resume.write(resume_key, state)

    about = AboutModel(
        model=ModelDescription.model_validate(UNetDescription(network=network).model_dump(mode="json")),
        made_by=command,
        seed=config.seed,
        settings=settings.model_dump(mode="json"),
        threads=torch.get_num_threads(),
        train_seconds=round(time.perf_counter() - began),
    )
    claim.hold()
    write_model(storage, folder, ema, dump_config(config), about)
    resume.delete(resume_key)
    return f"{storage.url}/{folder.rstrip('/')}"


def _checked_images(config: Config) -> RealImages:
    """The images to train on. Raises UserError if they are not those of the config's network, or too many to keep."""
    if config.teacher_training.label_dropout and not config.network.null_class:
        raise UserError("teacher_training.label_dropout: needs network.null_class true, or set it to 0")
    real = real_images(config)
    if real is None:
        raise UserError(
            f"data.name: train-teacher needs real images, of: {', '.join(DATA_SETS)}; or name your own in data.images"
        )
    size = 4 * math.prod(config.network.state_shape)
    if real.count * size > MOST_BYTES:
        raise UserError(
            f"data.images: {real.count} images are too many for train-teacher, which keeps at most {MOST_BYTES // size} of them"
        )
    return real


def _on_device(real: RealImages, device: torch.device) -> Split:
    """All training images and their classes, which are 0 if the network has none."""
    every = range(real.count)
    labels = real.labels(every)
    return Split(
        real.states(every).to(device),
        (torch.zeros(real.count, dtype=torch.int64) if labels is None else labels).to(device),
    )


def velocity_loss(unet: UNet, data: Split, config: Config, step: int) -> Tensor:
    """Mean squared error of v = alpha eps - sigma x0 at uniform times.

    Random draws depend only on (seed, step), and are made on the CPU: they are the same on every device.
    """
    settings, device = config.teacher_training, data.images.device
    draw = torch.Generator().manual_seed((config.seed << 32) + step)
    pick = torch.randint(len(data.images), (settings.batch_size,), generator=draw)
    dropped = torch.rand(len(pick), generator=draw) < settings.label_dropout
    t_N = torch.rand(len(pick), generator=draw, dtype=torch.float64)
    noise = torch.randn((len(pick), *data.images.shape[1:]), generator=draw)
    pick, dropped, t_N, noise = (copied_to(device, x) for x in (pick, dropped, t_N, noise))
    x0, labels = data.images[pick], torch.where(dropped, config.network.num_classes, data.labels[pick])
    alpha, sigma = (s.float()[:, None, None, None] for s in alpha_sigma(t_N))
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        predicted: Tensor = unet(
            alpha * x0 + sigma * noise,
            logsnr(t_N).float()[:, None],
            labels if config.network.num_classes else None,
        )
    return (predicted[:, 0].float() - (alpha * noise - sigma * x0)).square().mean()


def _saved_run(settings: Values, where: str) -> TeacherRun:
    """The run of a resume state, whose settings are in one mapping."""
    parts = {key: settings[key] for key in OF_RUN if key in settings}
    return validate(
        TeacherRun, {**parts, "training": {k: v for k, v in settings.items() if k not in parts}}, where
    )


def _load_resume_state(
    run: TeacherRun,
    resume: FolderStorage,
    key: str,
    unet: UNet,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor],
) -> tuple[int, float]:
    """Load an unfinished run.

    Returns its steps and seconds. Raises MissingObject, and UserError for another run.
    """
    where = f"{resume.url}/{key}"
    try:
        state = parse_torch(resume.read(key), where)
    except NotWeights as error:
        raise UserError(f"{error}; delete that file to begin anew") from None
    if changed := run.differing(_saved_run(state["settings"], where)):
        raise UserError(
            f"{where}: an unfinished run with another {', '.join(changed)}; "
            "go back to those values, choose another name=, or delete that file"
        )
    unet.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ema.update(state["ema"])
    return state["step"], state["seconds"]


def _resume_state(
    run: TeacherRun,
    unet: UNet,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor],
    step: int,
    seconds: float,
) -> bytes:
    values = run.model_dump(mode="json")
    settings = {**values.pop("training"), **values}
    buffer = io.BytesIO()
    state = {"model": unet.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema}
    torch.save({**state, "step": step, "seconds": seconds, "settings": settings}, buffer)
    return buffer.getvalue()
