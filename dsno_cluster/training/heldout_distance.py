"""How far a student's one-step images are from real ones during training, both held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.errors import UserError
from dsno_cluster.features.extractors import check_shape, load_fid_extractor, main_weights, moments_of_images
from dsno_cluster.features.statistics import distance_from
from dsno_cluster.images import to_uint8
from dsno_cluster.records import Values
from dsno_cluster.teachers import LoadedDecoder

# The first of the samples of `evaluation.seed` that are drawn here, beyond those of any evaluation: if the best
# checkpoint were chosen on the noises by which `eval` measures it, its figures would be too good.
FIRST_SAMPLE = 1 << 32


class HeldOutDistance:
    """The Frechet distance (Heusel et al. 2017, equation 6) of a student's images from held-out real ones, as `eval` has it.

    The features are those that `fid` reads, of `evaluation.feature_extractor` with its weights. Both sets of images
    have 8 bits. The extractor stays on `device`; torch's global random numbers are left as they are. `settings` are all that
    determines the distance beside the images that the student makes, and the real ones.
    """

    def __init__(
        self,
        config: Config,
        real: Iterable[Tensor],
        decoder: LoadedDecoder | None,
        device: torch.device,
        samples: int,
    ) -> None:
        """`real`: batches of uint8 images (N, C, H, W), read once; `samples`: of the student, 2 or more.

        `decoder` makes the images of the student's states; None: these are images. Raises UserError or WorkError as
        `load_fid_extractor` does, and UserError for images that the extractor does not read or a single real one.
        """
        settings = config.evaluation
        weights = main_weights(settings)
        self.settings: Values = {
            "extractor": weights.extractor,
            "weights": weights.sha256,
            "seed": settings.seed,
            "samples": samples,
        }
        self.seed, self.samples, self.batch_size = settings.seed, samples, settings.batch_size
        self.state_shape, self.num_classes = config.network.state_shape, config.network.num_classes
        self.decoder, self.device = decoder, device
        shape = self.state_shape if decoder is None else decoder.decoder.image_shape(self.state_shape)
        self.extractor = load_fid_extractor(settings, shape, device)
        found = moments_of_images(self.extractor, _checked(real, settings.feature_extractor))
        if found.count < 2:
            raise UserError("the held-out real images: their distance needs 2 or more, there is 1")
        self.real = found.gaussian

    def of(self, sample: Callable[[Tensor, Tensor | None], Tensor]) -> float:
        """The distance of the student that `sample` draws from; the same whenever the student is.

        `sample` gives states (N, C, H, W) in [-1, 1] from noise of that shape on the device and labels (N,) on the CPU,
        which are None without classes. Raises UserError if features are not finite.
        """
        return distance_from(moments_of_images(self.extractor, self._images(sample)), self.real)

    def _images(self, sample: Callable[[Tensor, Tensor | None], Tensor]) -> Iterator[Tensor]:
        """The student's images, uint8 (N, C, H, W), `evaluation.batch_size` at a time."""
        for start in range(0, self.samples, self.batch_size):
            stop = min(start + self.batch_size, self.samples)
            indices = range(FIRST_SAMPLE + start, FIRST_SAMPLE + stop)
            noise = sample_noise(self.seed, indices, self.state_shape).to(self.device)
            labels = sample_labels(self.seed, indices, self.num_classes) if self.num_classes else None
            states = sample(noise, labels)
            parts = [states] if self.decoder is None else self.decoder.parts(states)
            yield torch.cat([to_uint8(part) for part in parts])


def _checked(real: Iterable[Tensor], extractor: str) -> Iterator[Tensor]:
    """The batches of real images. Raises UserError for one that the extractor does not read."""
    for images in real:
        check_shape([extractor], images.shape[1:], "the held-out real images")
        yield images
