"""Real images as states of the model that is trained: images in [-1, 1], or latents, by index.

They are those of `data.name`, or of one's own at `data.images`. What a model of latents needs is encoded by its own
decoder's autoencoder. Small sets are kept in memory; of larger ones, images are read when they are asked for.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.data import DATA_SETS, load_data
from dsno_cluster.errors import UserError
from dsno_cluster.image_sets.image_set import ImageSet, Rows, Shape, among, lazily, rows_of
from dsno_cluster.image_sets.opening import held_out_split, open_images
from dsno_cluster.images import to_uint8
from dsno_cluster.records import canonical_hash
from dsno_cluster.teachers import States
from dsno_cluster.training.encoded_images import encoded_images

IN_MEMORY = 2**30  # bytes of a set of one's own, as it is read, that are kept
COLOURS = 3  # channels of pictures, also of those in grey
READ = 256  # images read at a time
LARGEST = 1.01  # of images in [-1, 1]: resizing and rounding overshoot a little


@dataclass(frozen=True)
class RealImages:
    """`count` real images to train on, as states, and `heldout` others, which training never sees.

    `identity` is a hash of all images, their classes, and what encodes them.
    """

    count: int
    heldout: int
    identity: str
    read_states: Rows
    read_pictures: Rows
    read_heldout: Rows
    classes: Tensor | None

    def states(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Training images as states (N, C, H, W) float32 on the CPU: images in [-1, 1], or latents."""
        return self.read_states(_listed(indices))

    def pictures(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Training images, uint8 (N, C, H, W); latents are decoded. Raises UserError for latents that nothing decodes."""
        return self.read_pictures(_listed(indices))

    def picture_batches(self, size: int, most: int | None = None) -> Iterator[Tensor]:
        """The first `most` (default: all) training images as `pictures`, at most `size` at a time."""
        count = self.count if most is None else min(self.count, most)
        for start in range(0, count, size):
            yield self.pictures(range(start, min(start + size, count)))

    def labels(self, indices: Tensor | Sequence[int]) -> Tensor | None:
        """Their classes (N,) int64; None if the network has none."""
        return None if self.classes is None else rows_of(self.classes)(_listed(indices))

    def heldout_batches(self, size: int) -> Iterator[Tensor]:
        """The held-out images, uint8 (n, C, H, W), at most `size` at a time; latents are decoded.

        Raises UserError for latents that nothing decodes.
        """
        for start in range(0, self.heldout, size):
            yield self.read_heldout(range(start, min(start + size, self.heldout)))


def real_images(
    config: Config,
    states: States | None = None,
    device: torch.device | None = None,
    *,
    quiet: bool = False,
) -> RealImages | None:
    """The real images of a config, for a model of such `states` (default: images of the network's shape).

    They are read when they are first asked for. Latents are encoded and decoded on `device` (default: the CPU), and then kept
    on the CPU. `quiet` shows no progress, for all ranks except one. None if the config names no real images. Raises UserError
    if they are not of the model's size, or lack the classes of a network that is class-conditional.
    """
    states = states or States(config.network.state_shape)
    if config.data.name is not None:
        return _of_name(config, states)
    return (
        None if config.data.images is None else _of_address(config, config.data.images, states, device, quiet)
    )


def _of_name(config: Config, states: States) -> RealImages:
    name = config.data.name
    assert name is not None
    its, classes = DATA_SETS[name].shape, DATA_SETS[name].num_classes
    if states.decoder is not None or states.undecoded or its != states.shape:
        theirs, ours = _form(its), _form(states.shape)
        raise UserError(f"network: images of {name} are {theirs}, the network's {ours}")
    if config.network.num_classes not in (0, classes):
        raise UserError(
            f"network.num_classes: {name} has {classes} classes, the network {config.network.num_classes}"
        )
    train, held_out = load_data(name, config.data.path)
    content = [train.images, train.labels, held_out.images]
    return RealImages(
        count=len(train.images),
        heldout=len(held_out.images),
        identity=canonical_hash({"name": name, "content": [_sha256(tensor) for tensor in content]}),
        read_states=rows_of(train.images),
        read_pictures=rows_of(to_uint8(train.images)),
        read_heldout=rows_of(to_uint8(held_out.images)),
        classes=train.labels if config.network.num_classes else None,
    )


def _of_address(
    config: Config, address: str, states: States, device: torch.device | None, quiet: bool
) -> RealImages:
    num_classes = config.network.num_classes
    try:
        endpoint = config.storage.endpoint_url
        images = open_images(address, endpoint, states=states.shape, num_classes=num_classes)
        if images.dtype == torch.uint8:
            states.check_decoded(address, "name latents: .npy members of tars, or an .npz of them")
            _check_size(images, states)
        classes = _classes(images, num_classes) if num_classes else None
    except UserError as error:
        raise UserError(f"data.images: {error}") from None
    if not quiet:
        images.say_note()
    training, held_out = held_out_split(images.count)
    content: dict[str, JsonValue] = {"images": images.identity.model_dump(mode="json")}
    if classes is not None:
        content["classes"] = _sha256(classes)
    encoder = states.decoder if images.dtype == torch.uint8 else None
    if encoder is not None:
        named = encoder.identity(states.shape).model_dump(mode="json")
        content["encoder"] = {key: value for key, value in named.items() if key != "precision"}
    identity = canonical_hash(content)
    small = math.prod(images.shape) * images.dtype.itemsize * images.count <= IN_MEMORY
    read = images.at
    if small and encoder is None:
        read = lazily(lambda: rows_of(_all(images, quiet)))
    if images.dtype == torch.uint8:
        pixels = _of_colours(read, states.image_shape[0], address)
        pictures = pixels
        as_states = among(_in_range(pixels), training)
    else:
        read = read if states.decoder is not None or states.undecoded else _checked_range(read, address)
        pictures = _drawn(read, config, states, device)
        as_states = among(read, training)
    if encoder is not None:
        folder = config.run_dir / "real-images" / identity
        plain = as_states
        as_states = lazily(
            lambda: encoded_images(plain, len(training), encoder, states.shape, folder, device, quiet)
        )
    return RealImages(
        count=len(training),
        heldout=len(held_out),
        identity=identity,
        read_states=as_states,
        read_pictures=among(pictures, training),
        read_heldout=among(pictures, held_out),
        classes=None if classes is None else classes[training],
    )


def _classes(images: ImageSet, num_classes: int) -> Tensor:
    """The classes of all images. Raises UserError if they are not known, or not classes of the network."""
    if images.labels_at is None:
        raise UserError(
            f"{images.address}: nothing says the classes of its images, and the network has {num_classes}; looked for are "
            f"{images.classes_in}"
        )
    classes = images.labels_at(range(images.count))
    if int(classes.min()) < 0 or int(classes.max()) >= num_classes:
        least, largest = int(classes.min()), int(classes.max())
        raise UserError(
            f"{images.address}: has classes from {least} to {largest}, the network 0 to {num_classes - 1}"
        )
    return classes


def _check_size(images: ImageSet, states: States) -> None:
    """Raises UserError unless the images have the size of the model's; grey ones are read as colours of one value."""
    wanted = states.image_shape
    if images.shape[1:] != wanted[1:] or images.shape[0] not in (wanted[0], COLOURS if wanted[0] == 1 else 0):
        raise UserError(
            f"{images.address}: images are {_form(images.shape)}, the config's are {_form(wanted)}; resize them first"
        )


def _all(images: ImageSet, quiet: bool) -> Tensor:
    """All images of a set, read with a progress."""
    found = torch.empty((images.count, *images.shape), dtype=images.dtype)
    with console.progress("reading the real images", images.count, "images", quiet=quiet) as advance:
        for start in range(0, images.count, READ):
            rows = range(start, min(start + READ, images.count))
            found[start : rows.stop] = images.at(rows)
            advance(len(rows))
    return found


def _of_colours(read: Rows, channels: int, address: str) -> Rows:
    """Images uint8 of so many channels: the one of pictures in grey, if that is asked for. Raises UserError for colours."""

    def grey(indices: Sequence[int]) -> Tensor:
        images_NCHW = read(indices)
        first = images_NCHW[:, :1]
        if channels < images_NCHW.shape[1] and bool((images_NCHW != first).any()):
            raise UserError(
                f"data.images: {address}: has images in colour, and the config's have one channel"
            )
        return first

    return grey if channels == 1 else read


def _in_range(pixels: Rows) -> Rows:
    """Images of 8 bit as float32 in [-1, 1]."""
    return lambda indices: pixels(indices).float() / 127.5 - 1.0


def _checked_range(read: Rows, address: str) -> Rows:
    """States that are images. Raises UserError if they are not in [-1, 1]."""

    def checked(indices: Sequence[int]) -> Tensor:
        states = read(indices)
        if not bool((states.abs() <= LARGEST).all()):
            raise UserError(f"data.images: {address}: images as floating-point numbers must be in [-1, 1]")
        return states

    return checked


def _drawn(read: Rows, config: Config, states: States, device: torch.device | None) -> Rows:
    """The images uint8 of states, which are decoded if they are latents."""
    decoder = functools.cache(
        lambda: states.decoder.load(device, config.evaluation.precision) if states.decoder else None
    )

    def drawn(indices: Sequence[int]) -> Tensor:
        states.check_decoded("data.images", "do without its held-out images")
        found, decode = read(indices), decoder()
        return to_uint8(found if decode is None else decode(found))

    return drawn


def _listed(indices: Tensor | Sequence[int]) -> Sequence[int]:
    return indices.tolist() if isinstance(indices, Tensor) else indices


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _form(shape: Shape) -> str:
    return "x".join(map(str, shape))
