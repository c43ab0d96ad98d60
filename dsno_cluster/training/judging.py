"""The images from which the distance of a student's samples decides which checkpoint of distribution matching is the best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.images import to_uint8
from dsno_cluster.storage import open_storage
from dsno_cluster.teachers import LoadedDecoder, States
from dsno_cluster.training.real_images import RealImages
from dsno_cluster.trajectories.shards import Manifest, read_shard

# Of fewer images, the covariance of their features is farther from that of all images than checkpoints are from one another.
FEWEST_HELD_OUT = 2000
MOST = 10_000


def can_judge(config: Config, states: States) -> bool:
    """Whether there are images from which the distance of samples can be measured.

    There are none if nothing decodes the states, nor without real images if the trajectories are made online.
    """
    return not states.undecoded and (config.data.named or not config.training.online)


@dataclass(frozen=True)
class JudgingImages:
    """Batches of uint8 images (n, C, H, W), read once, and which ones they are: what no other images have."""

    identity: tuple[str, str]
    batches: Iterator[Tensor]


def images_to_judge_by(
    config: Config,
    real: RealImages | None,
    states: States,
    decoder: LoadedDecoder | None,
    folder: str,
    manifest: Manifest | None,
) -> JudgingImages | None:
    """The images with which samples are compared; which ones, is said.

    They are the held-out real images. If these are too few, they are the real images of training, so that only the noise of
    the samples is held out; without real images, the teacher's own, at the end of its trajectories in `folder`. None unless
    `can_judge`.
    """
    if not can_judge(config, states):
        return None
    size = config.evaluation.batch_size
    if real is not None and real.heldout >= FEWEST_HELD_OUT:
        return _said(f"{real.heldout} held-out real images", "", real.identity, real.heldout_batches(size))
    if real is not None:
        count = min(real.count, MOST)
        why = f", as the {real.heldout} that are held out are too few to tell checkpoints apart"
        return _said(f"{count} real images of training", why, real.identity, real.picture_batches(size, MOST))
    assert manifest is not None  # the beginning has found it, as `needs_trajectories` asks
    shards = [shard for shard in manifest.shards if shard.start < MOST]
    images = _of_teacher(config, decoder, folder, manifest)
    return _said(f"{shards[-1].stop} images of the teacher", "", folder, images)


def _of_teacher(
    config: Config, decoder: LoadedDecoder | None, folder: str, manifest: Manifest
) -> Iterator[Tensor]:
    storage = open_storage(config.storage.root, config.storage.endpoint_url)
    for shard in manifest.shards:
        if shard.start < MOST:
            last_NCHW = read_shard(storage, folder, shard)["states"][-1].float()
            parts = [last_NCHW] if decoder is None else decoder.parts(last_NCHW)
            yield to_uint8(torch.cat(list(parts)))


def _said(what: str, why: str, source: str, batches: Iterator[Tensor]) -> JudgingImages:
    console.say(f"checkpoints are judged by the distance of their samples from {what}{why}")
    return JudgingImages((what, source), batches)
