"""Feature extractors of torch-fidelity's registry: the layers that metrics read, checked weights, features."""

from __future__ import annotations

import re
import shutil
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from dsno_cluster import console
from dsno_cluster.config import Evaluation
from dsno_cluster.device import allowing_tf32
from dsno_cluster.errors import UserError, WorkError, said_by
from dsno_cluster.features import INCEPTION
from dsno_cluster.features.classifiers import CLASSIFIERS, Classifier
from dsno_cluster.features.fidelity_internals import accepting_floats
from dsno_cluster.features.inception import CLEAN, SPATIAL, WithSpatial
from dsno_cluster.features.statistics import Moments, merge, moments_on_device
from dsno_cluster.features.vision_transformers import TRANSFORMERS, check_installed
from dsno_cluster.files import cache_folder, file_sha256, not_there, written_aside
from dsno_cluster.model_folder import package_path
from dsno_cluster.weight_files import HEAD, disguise, parse_weights

VGG = "vgg16"
# extractors whose weights are tensors by name; others' may hold programs
STATE_DICTS = (*CLASSIFIERS, *TRANSFORMERS, VGG, INCEPTION, CLEAN)
OTHER_KEY = "evaluation.precision_recall_weights"  # of the keys of another extractor
# torch-fidelity's names of the metrics that read features; `nearest` and `cmmd` are not its own, and read what FID reads
METRICS = {
    "fid": "fid",
    "kid": "kid",
    "inception_score": "isc",
    "precision_recall": "prc",
    "nearest": "fid",
    "cmmd": "fid",
}
BATCH = 64  # images at a time, torch-fidelity's default
WEIGHT_FILE = "weights.safetensors"


@dataclass(frozen=True)
class WeightsFile:
    """Checked weights of an extractor of torch-fidelity's registry."""

    extractor: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class Reading:
    """The layer of an extractor that a metric reads."""

    extractor: str
    layer: str

    @property
    def key(self) -> str:
        return f"{self.extractor}/{self.layer}"


Readings = dict[str, Reading]  # by metric


@dataclass(frozen=True)
class Extractor:
    """An extractor with its weights."""

    network: nn.Module
    channels: int
    layers: tuple[str, ...]

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """uint8 (N, C, H, W) -> features (N, D) by layer, float32 on the extractor's device; BATCH images at a time."""
        device = next(self.network.parameters()).device
        parts: list[tuple[Tensor, ...]] = []
        for batch in images_NCHW.split(BATCH):
            batch = batch.expand(-1, self.channels, -1, -1) if batch.shape[1] == 1 else batch
            parts.append(tuple(self.network(batch.to(device))))
        return {layer: torch.cat([part[i] for part in parts]) for i, layer in enumerate(self.layers)}

    def of_float(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """The features of images in [-1, 1], which are not rounded to 8 bits, with gradients if the images have them.

        The images are on the extractor's device, and taken all at once.
        """
        images = images_NCHW.expand(-1, self.channels, -1, -1) if images_NCHW.shape[1] == 1 else images_NCHW
        if isinstance(self.network, Classifier):
            found = self.network.of_float(images)
        else:
            with accepting_floats(self.network):
                found = tuple(self.network(127.5 * images.clamp(-1.0, 1.0) + 127.5))
        return dict(zip(self.layers, found, strict=True))


def check_differentiable(extractor: str, key: str) -> None:
    """Raises UserError, naming the `key`, for an extractor through which images get no gradient."""
    if extractor in (CLEAN, *TRANSFORMERS):
        raise UserError(
            f"{key}: {extractor} resizes images in 8 bits, so they get no gradient; train by another "
            f"evaluation.feature_extractor, and evaluate by {extractor} afterwards"
        )


def layer_of(extractor: str, metric: str) -> str:
    """The layer that a metric reads by default in torch-fidelity; the class logits for `agreement`, ADM's for `sfid`.

    Raises UserError if the extractor has no such layer.
    """
    if metric == "agreement":
        return "logits"
    if metric == "sfid":
        if extractor != INCEPTION:
            raise UserError(
                f"evaluation.metrics: sfid reads a layer of {INCEPTION}, which {extractor} has not"
            )
        return SPATIAL
    return str(FEATURE_EXTRACTORS_REGISTRY[extractor].get_default_feature_layer_for_metric(METRICS[metric]))


def find_readings(settings: Evaluation) -> Readings:
    """The layer that each metric of the config reads, for those that read features.

    Raises UserError for an unknown extractor.
    """
    found: Readings = {}
    for metric in settings.metrics:
        if metric == "trajectory_error":
            continue
        name = settings.feature_extractor
        if metric == "precision_recall" and settings.precision_recall_extractor is not None:
            name = settings.precision_recall_extractor
        _check_known(name)
        found[metric] = Reading(name, layer_of(name, metric))
    return found


def check_shape(extractors: Iterable[str], shape: Sequence[int], what: str) -> None:
    """Raises UserError if one of the extractors does not read images (C, H, W) of that shape."""
    form = "x".join(map(str, shape))
    for name in extractors:
        if name in CLASSIFIERS and tuple(shape) != CLASSIFIERS[name].SHAPE:
            its = "x".join(map(str, CLASSIFIERS[name].SHAPE))
            raise UserError(f"evaluation.feature_extractor: {name} reads images of {its}, {what} are {form}")
        if shape[0] not in (1, 3):
            raise UserError(
                f"evaluation.feature_extractor: {name} reads images of 1 or 3 channels, {what} are {form}"
            )


def find_all_weights(settings: Evaluation) -> dict[str, WeightsFile]:
    """The checked weights of every extractor that the config's metrics read.

    Raises as `find_weights` does.
    """
    found = {}
    for reading in find_readings(settings).values():
        name = reading.extractor
        if name in found:
            continue
        if name == settings.feature_extractor:
            found[name] = main_weights(settings)
        else:
            found[name] = find_weights(
                name,
                settings.precision_recall_weights_path,
                settings.precision_recall_weights_sha256,
                OTHER_KEY,
            )
    return found


def weights_at_hand(settings: Evaluation) -> dict[str, WeightsFile] | None:
    """As `find_all_weights`, but None if a file is missing that would be downloaded.

    Raises as `find_weights` does.
    """
    given = {settings.feature_extractor: settings.weights_path}
    if settings.precision_recall_extractor is not None:
        given.setdefault(settings.precision_recall_extractor, settings.precision_recall_weights_path)
    names = {reading.extractor for reading in find_readings(settings).values()}
    return find_all_weights(settings) if all(_at_hand(name, given[name]) for name in names) else None


def main_weights_at_hand(settings: Evaluation) -> WeightsFile | None:
    """As `main_weights`, but None if the file is missing that would be downloaded."""
    name, path = settings.feature_extractor, settings.weights_path
    return main_weights(settings) if _at_hand(name, path) else None


def _at_hand(name: str, path: str | None) -> bool:
    """Whether an extractor whose weights are given at `path`, or not, needs no download."""
    if path is not None or name in CLASSIFIERS:
        return True
    url = published_url(name)
    return url is not None and (cache_folder("weights") / url.rsplit("/", 1)[1]).is_file()


def find_weights(
    name: str, path: str | None, sha256: str | None, key: str = "evaluation.weights"
) -> WeightsFile:
    """The weights of an extractor: the file at `path`, or the published one, downloaded once.

    The file's sha256 must begin with `sha256`. Raises UserError for an unknown name, missing weights, a file
    that holds none, or weights without a known sha256, because torch-fidelity unpickles them; WorkError for
    another sha256 or a failed download.
    """
    _check_known(name)
    if name in TRANSFORMERS:
        check_installed()
    if path is None and name in CLASSIFIERS:
        path = f"package:{name}"
    if path is None:
        return _downloaded(name, key)
    file = Path(package_path(path))
    file = file / WEIGHT_FILE if file.is_dir() else file
    if not file.is_file():
        reason = not_there(file) if not file.exists() else "is not a file"
        raise UserError(f"{key}_path: {path} is missing ({reason}); put the weights of {name} there")
    found = file_sha256(file)
    weights = WeightsFile(name, file, found)
    if sha256 and not found.startswith(sha256):
        raise WorkError(f"{key}_path: {file} has sha256 {found}, not {sha256}")
    if is_published(weights):
        return weights
    with file.open("rb") as opened:
        if problem := disguise(opened.read(HEAD)):
            raise UserError(f"{key}_path: {file} {problem}")
    if name not in CLASSIFIERS and not sha256:
        raise UserError(
            f"{key}_sha256: needed for {file.name}, whose loading can run code; its sha256 is {found}"
        )
    if name in STATE_DICTS:  # whatever its sha256, it holds only tensors
        parse_weights(file, f"{key}_path: {file}")
    return weights


def main_weights(settings: Evaluation) -> WeightsFile:
    """The checked weights of `evaluation.feature_extractor`. Raises as `find_weights` does."""
    return find_weights(settings.feature_extractor, settings.weights_path, settings.weights_sha256)


def check_given_weights(settings: Evaluation) -> None:
    """Raises as `find_weights` does for the weights that the config names itself; downloads nothing."""
    used = {reading.extractor for reading in find_readings(settings).values()}
    other = settings.precision_recall_extractor
    if settings.weights_path and settings.feature_extractor in used:
        main_weights(settings)
    if settings.precision_recall_weights_path and other in used and other != settings.feature_extractor:
        find_weights(
            other, settings.precision_recall_weights_path, settings.precision_recall_weights_sha256, OTHER_KEY
        )


def published_url(name: str) -> str | None:
    """The URL of the weights with which published figures were computed.

    None for extractors not known here.
    """
    if name in (INCEPTION, CLEAN):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        return str(URL_INCEPTION_V3)
    if name == VGG:
        from torchvision.models import VGG16_Weights

        return str(VGG16_Weights.IMAGENET1K_V1.url)
    return None


def is_published(weights: WeightsFile) -> bool:
    """Whether these are the weights with which the field's published figures were computed."""
    url = published_url(weights.extractor)
    return url is not None and weights.sha256.startswith(_digits_in(url))


def load_extractor(
    weights: WeightsFile, layers: Iterable[str], device: torch.device | None = None
) -> Extractor:
    """The extractor, giving `layers`, on `device` (default: the GPU that this process uses, or the CPU).

    torch's global random numbers are left as they are. Raises WorkError if the file has changed, and UserError if its
    weights are not this extractor's.
    """
    if (found := file_sha256(weights.path)) != weights.sha256:
        raise WorkError(f"{weights.path}: has sha256 {found} now, not {weights.sha256}")
    layers = tuple(dict.fromkeys(layers))
    try:
        with torch.random.fork_rng(devices=[]):  # layers draw their weights before they are given them
            network = create_feature_extractor(
                weights.extractor,
                WithSpatial.layers_of_inception(layers),
                cuda=False,
                feature_extractor_weights_path=str(weights.path),
                verbose=False,
            )
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise UserError(
            f"{weights.path}: does not hold the weights of {weights.extractor}: {said_by('torch', error)}"
        ) from error
    if SPATIAL in layers:
        network = WithSpatial(network, layers)
    network.to(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Extractor(network, 1 if weights.extractor in CLASSIFIERS else 3, layers)


def load_fid_extractor(settings: Evaluation, shape: Sequence[int], device: torch.device) -> Extractor:
    """The extractor of `evaluation.feature_extractor` with the layer that `fid` reads, for samples (C, H, W) of that shape.

    Raises UserError or WorkError as `main_weights` and `load_extractor`, and UserError if it does not read such samples.
    """
    weights = main_weights(settings)
    check_shape([weights.extractor], shape, "the samples")
    return load_extractor(weights, [layer_of(weights.extractor, "fid")], device)


@torch.no_grad()
def moments_of_images(extractor: Extractor, batches: Iterable[Tensor]) -> Moments:
    """The moments of the features of images, uint8 (n, C, H, W), which are drawn as they are needed, by the only layer.

    In float32, as `eval` has them: a training may allow TensorFloat-32 in the whole process.
    """
    (layer,) = extractor.layers
    with allowing_tf32(False):
        return merge(moments_on_device(extractor(images)[layer]) for images in batches)


def _check_known(name: str) -> None:
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(sorted(FEATURE_EXTRACTORS_REGISTRY))
        raise UserError(f"evaluation.feature_extractor: {name!r} is not one of: {known}")


def _digits_in(url: str) -> str:
    """The first digits of the sha256, which are part of the names of published weights."""
    found = re.search(r"-([0-9a-f]{8,})\.\w+$", url)
    assert found is not None, url
    return found[1]


def _downloaded(name: str, key: str) -> WeightsFile:
    """The published weights from the cache, downloaded first if necessary."""
    url = published_url(name)
    if url is None:
        raise UserError(f"{key}_path: the weights of {name} are needed; name their file")
    try:
        file, digits = cache_folder("weights") / url.rsplit("/", 1)[1], _digits_in(url)
    except UserError:
        raise UserError(
            f"{key}_path: there is no home folder (HOME is not set) to keep the weights of {name} in: name their file, or set "
            "XDG_CACHE_HOME"
        ) from None
    if not file.is_file():
        console.say(f"downloading the weights of {name}, once: {url}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(file) as aside:
                with urllib.request.urlopen(url, timeout=30) as source, aside.open("wb") as target:
                    shutil.copyfileobj(source, target)
                if not (found := file_sha256(aside)).startswith(digits):
                    raise WorkError(f"{url}: sent a file of sha256 {found}, not {digits}...; it was not kept")
                aside.rename(file)
        except (OSError, HTTPException) as error:  # no network, a proxy, a full disk
            reason = getattr(error, "reason", None) or error
            raise WorkError(
                f"{key}_path: {file.name} cannot be downloaded ({reason}); from a machine that can, put {url} at {file}; "
                "evaluation.metrics=[trajectory_error] needs none"
            ) from error
    found = file_sha256(file)
    if not found.startswith(digits):
        raise WorkError(f"{file}: has sha256 {found}, not {digits}...; delete it, and it is downloaded again")
    return WeightsFile(name, file, found)
