"""What the formats have in common: the samples of a part, and what may go wrong with foreign ones."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


PartFile = io.BufferedReader | io.BytesIO  # a part in a folder, or in memory


class BadPart(UserError):
    """A part, or a sample in it, is not what its format says."""


@dataclass(frozen=True)
class Samples:
    """Samples to write, from number `start` on, in the dtype and scale of the index.

    `path` is (N, steps, C, H, W) and begins with the noise, `latent` (N, C, H, W), `labels` (N,) or None.
    """

    start: int
    path: Tensor
    latent: Tensor
    labels: Tensor | None
    num_classes: int


@dataclass(frozen=True)
class ForeignSample:
    """A sample as somebody's part has it: floating-point tensors of any scale.

    `path` is (steps, C, H, W) and begins with the noise, `noise` and `latent` are (C, H, W); a format has some of them.
    `label` is a class number of `num_classes`, where the sample says of how many.
    """

    where: str
    path: Tensor | None
    noise: Tensor | None
    latent: Tensor | None
    label: int | None
    num_classes: int | None


class OpenPart(Protocol):
    """A part that is open for reading."""

    def __len__(self) -> int:
        """The number of its samples."""
        ...

    def sample(self, index: int) -> ForeignSample:
        """Sample `index` of the part. Raises BadPart."""
        ...
