"""sample: images from a student into a file, with the rate they came at."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from dsno_cluster import console
from dsno_cluster.device import compute_device
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.errors import WorkError
from dsno_cluster.images import grid_png, to_uint8
from dsno_cluster.models.dsno import load_student
from dsno_cluster.storage import open_storage


def sample_to_file(
    checkpoint: str, out: str, num: int, seed: int, batch_size: int, endpoint_url: str | None = None
) -> None:
    """Write `num` images to `out`: a grid (.png) or arrays `images` uint8 (N, C, H, W) and `labels` (.npz).

    Image i is a function of (seed, i) alone. Raises WorkError where the file cannot be written.
    """
    student = load_student(checkpoint, endpoint_url)
    device = compute_device()
    student.to(device)
    network = student.network
    shape = (network.channels, network.image_size, network.image_size)
    labels = sample_labels(seed, range(num), network.num_classes) if network.num_classes else None
    images, seconds = [], 0.0
    for start in range(0, num, batch_size):
        part = slice(start, min(start + batch_size, num))
        noise = sample_noise(seed, range(part.start, part.stop), shape).to(device)
        began = time.perf_counter()
        images.append(student.sample(noise, None if labels is None else labels[part].to(device)).cpu())
        seconds += time.perf_counter() - began
    path = Path(out)
    if out.endswith(".npz"):
        import io

        buffer = io.BytesIO()
        pixels = to_uint8(torch.cat(images)).numpy()
        if labels is None:
            np.savez(buffer, images=pixels)
        else:
            np.savez(buffer, images=pixels, labels=labels.numpy())
        data = buffer.getvalue()
    else:
        data = grid_png(torch.cat(images), columns=max(1, round(num**0.5)))
    try:
        open_storage(str(path.parent)).write(path.name, data)
    except OSError as error:
        raise WorkError(f"{out}: cannot be written: {error.strerror}") from error
    console.say(f"{num} images in {seconds:.2f} s, {num / seconds:.0f} images/s: {out}")
