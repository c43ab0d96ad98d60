"""States that are latents: decoded wherever images are needed, against diffusers' own autoencoder and its stored output."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from inception import save_random_inception
from PIL import Image
from report_runs import metrics
from teacher_models import one_thread as one_thread  # fixture
from tiny import DATA, TINY, answer, dsno
from torch import Tensor

from dsno_cluster import load_student
from dsno_cluster.config import Config, load_config
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.evaluation.kept_rows import KeptRows
from dsno_cluster.evaluation.look_up import check_comparison
from dsno_cluster.evaluation.pictures import layout, pictures, solve_pictured
from dsno_cluster.evaluation.records import Metrics
from dsno_cluster.evaluation.sample_shards import SampleSpec
from dsno_cluster.evaluation.watch import settings_hashes
from dsno_cluster.files import file_sha256
from dsno_cluster.images import to_uint8
from dsno_cluster.provenance import environment
from dsno_cluster.storage import FolderStorage
from dsno_cluster.teachers import (
    States,
    TeacherInfo,
    compared_samplings,
    decoders,
    find_teacher,
    of_config,
    states_of,
    teacher_info,
)
from dsno_cluster.teachers.decoders import Decoder, open_decoder
from dsno_cluster.teachers.identity import GaussianIdentity
from dsno_cluster.training.beginning import new_student
from dsno_cluster.trajectories.spec import spec_of

PIPELINE = DATA / "dit_pipeline"
STATE_DICT = DATA / "state_dicts/dit/weights.pt"
EXPECTED = safetensors.torch.load_file(PIPELINE / "expected.safetensors")
SHAPE = (4, 8, 8)
LATENTS = [
    *("data.name=null", "network.state_size=8", "network.state_channels=4"),
    *("network.multipliers=[1]", "network.attention_resolutions=[]", "student.warm_start=false"),
]
OF_STATE_DICT = [f"teacher.path={STATE_DICT}", "teacher.options={family: dit, num_heads: 4}"]


def config_of(tmp_path: Path, *words: str) -> Config:
    given = [f"storage.root={tmp_path}", f"evaluation.reference={tmp_path}/none.npz", *TINY, *LATENTS]
    return load_config("configs/digits.yaml", [*given, "evaluation.metrics=[fid, trajectory_error]", *words])


def decoder_of(path: Path) -> Decoder:
    found = teacher_info(str(path)).decoder
    assert found is not None
    return found


@pytest.fixture
def own_vae(tmp_path: Path) -> Path:
    """The pipeline's autoencoder in a folder of its own."""
    return Path(shutil.copytree(PIPELINE / "vae", tmp_path / "own-vae"))


def rewritten(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def test_a_pipeline_decodes_as_diffusers_does() -> None:
    decoder = decoder_of(PIPELINE)
    assert decoder.image_shape(SHAPE) == (3, 32, 32)
    images = decoder.load()(EXPECTED["latents"])
    assert images.dtype == torch.float32
    assert torch.allclose(images, EXPECTED["decoded"], atol=1e-5)


@pytest.mark.parametrize("place", ["the folder of an autoencoder", "a pipeline"])
def test_a_decoder_that_the_config_names(place: str, own_vae: Path, tmp_path: Path) -> None:
    named = own_vae if place.startswith("the") else PIPELINE
    config = config_of(tmp_path, *OF_STATE_DICT, f"teacher.decoder={named}")
    teacher = find_teacher(config)
    assert teacher.states.image_shape == (3, 32, 32)
    assert teacher.states.decoder is not None
    assert states_of(config) == teacher.states  # found without the teacher's weights
    images = teacher.states.decoder.load()(EXPECTED["latents"])
    assert torch.allclose(images, EXPECTED["decoded"], atol=1e-5)


def test_a_decoder_does_not_name_a_data_set(own_vae: Path, tmp_path: Path) -> None:
    plain = config_of(tmp_path, *OF_STATE_DICT)
    named = config_of(tmp_path, *OF_STATE_DICT, f"teacher.decoder={own_vae}")
    assert spec_of(plain, find_teacher(plain)).hash == spec_of(named, find_teacher(named)).hash


def test_the_identity_of_a_decoder(own_vae: Path) -> None:
    decoder = open_decoder(str(own_vae), None, 4, "teacher.decoder")
    identity = decoder.identity(SHAPE)
    file = own_vae / "diffusion_pytorch_model.bin"
    assert identity.sha256 == {file.name: file_sha256(file)}
    assert (identity.scaling_factor, identity.shift_factor) == (0.18215, 0.0)
    assert identity.image_shape == (3, 32, 32)
    assert identity.config["latent_channels"] == 4
    weights = torch.load(file, weights_only=True)
    torch.save({name: tensor + 1e-3 for name, tensor in weights.items()}, file)
    with pytest.raises(WorkError, match="the decoder's weights have changed"):
        decoder.load()
    other = open_decoder(str(own_vae), None, 4, "teacher.decoder").identity(SHAPE)
    config = load_config("configs/digits.yaml")
    assert len({settings_hashes(config, of) for of in (None, identity, other)}) == 3


@pytest.mark.parametrize("form", ["shift", "by channel"])
def test_scales_of_latents(form: str, own_vae: Path) -> None:
    """An image is decode(latent / scale + shift), or by the mean and deviation of each channel, as in diffusers' pipelines."""
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.4]), torch.tensor([1.5, 0.5, 2.0, 1.0])
    values: dict[str, Any] = {"scaling_factor": 0.36, "shift_factor": 0.12}
    if form == "by channel":
        values = {"scaling_factor": 1.0, "latents_mean": mean.tolist(), "latents_std": std.tolist()}
    rewritten(own_vae, **values)
    vae = diffusers.AutoencoderKL.from_pretrained(own_vae).eval()
    latents = EXPECTED["latents"]
    given = latents / 0.36 + 0.12
    if form == "by channel":
        given = latents * std[:, None, None] + mean[:, None, None]
    with torch.no_grad():
        expected = vae.decode(given).sample
    found = open_decoder(str(own_vae), None, 4, "x").load()(latents)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found - EXPECTED["decoded"]).abs().max() > 0.01


@pytest.mark.parametrize("form", ["shift", "by channel"])
def test_encoding_is_the_inverse_of_decoding(
    form: str, own_vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A latent is diffusers' posterior mean, scaled as its image-to-image pipelines do: StableDiffusion3's for a shift,
    StableDiffusionXL's by channel. Decoded, it gives diffusers' own reconstruction."""
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.4]), torch.tensor([1.5, 0.5, 2.0, 1.0])
    values: dict[str, Any] = {"scaling_factor": 0.36, "shift_factor": 0.12}
    if form == "by channel":
        values = {"scaling_factor": 0.7, "latents_mean": mean.tolist(), "latents_std": std.tolist()}
    rewritten(own_vae, **values)
    vae = diffusers.AutoencoderKL.from_pretrained(own_vae).eval()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        reconstructed = vae.decode(posterior.mean).sample
    expected = (posterior.mean - 0.12) * 0.36
    if form == "by channel":
        expected = (posterior.mean - mean[:, None, None]) * 0.7 / std[:, None, None]
    decoder = open_decoder(str(own_vae), None, 4, "x")
    monkeypatch.setattr(decoders, "MOST_ELEMENTS", 2 * 8 * 32 * 32)  # two images at a time
    latents = decoder.load_encoder()(images)
    assert latents.shape == (3, 4, 8, 8)
    assert torch.allclose(latents, expected, atol=1e-5)
    assert torch.allclose(decoder.load()(latents), reconstructed, atol=1e-4)


def test_latents_of_any_sides_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded one after the other if more do not fit, with the same images."""
    decoder = decoder_of(PIPELINE)
    loaded = decoder.load()
    latents = torch.randn(5, 4, 4, 10, generator=torch.Generator().manual_seed(0))
    whole = loaded(latents)
    assert whole.shape[1:] == decoder.image_shape((4, 4, 10)) == (3, 16, 40)
    monkeypatch.setattr(decoders, "MOST_ELEMENTS", 2 * 8 * 16 * 40)  # 8 channels at the image's size
    assert [len(part) for part in loaded.parts(latents)] == [2, 2, 1]
    assert torch.allclose(loaded(latents), whole, atol=1e-5)


def test_precision_of_a_decoder() -> None:
    decoder = decoder_of(PIPELINE)
    images = decoder.load(precision="bfloat16")(EXPECTED["latents"])
    assert images.dtype == torch.float32
    difference = (images - EXPECTED["decoded"]).abs().mean()
    assert 1e-4 < difference < 0.05
    assert decoder.identity(SHAPE, "bfloat16") != decoder.identity(SHAPE)
    with pytest.raises(UserError, match="precision"):
        load_config("configs/digits.yaml", ["evaluation.precision=float16"])


REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "of pixels": (
        ["network.state_channels=1", "teacher.path=package:digits-teacher", "network.multipliers=[1, 2]"],
        {},
        "decodes latents of 4 channels, and the states have 1",
    ),
    "another class": (OF_STATE_DICT, {"_class_name": "VQModel"}, "is VQModel, and only AutoencoderKL"),
    "another scale": (
        [f"teacher.path={PIPELINE}"],
        {"scaling_factor": 0.5},
        "has scaling_factor 0.5, .* 0.18215",
    ),
    "no scale": (OF_STATE_DICT, {"scaling_factor": 0}, "scaling_factor 0 is no scale"),
    "text for a scale": (OF_STATE_DICT, {"scaling_factor": "1"}, "scaling_factor '1' is not a number"),
    "half a scale": (
        OF_STATE_DICT,
        {"latents_std": [1, 1, 1, 1]},
        "latents_mean and latents_std go together",
    ),
    "short means": (OF_STATE_DICT, {"latents_mean": [1, 1]}, "is no list of 4 numbers"),
    "no widths": (OF_STATE_DICT, {"block_out_channels": "4"}, "are no numbers of channels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_decoders_that_are_refused(case: str, own_vae: Path, tmp_path: Path) -> None:
    words, values, message = REFUSED[case]
    config = config_of(tmp_path, *words, f"teacher.decoder={rewritten(own_vae, **values)}")
    with pytest.raises(UserError, match=f"^teacher.decoder: .*{message}") as refused:
        find_teacher(config)
    assert "\n" not in str(refused.value)


def test_a_folder_without_an_autoencoder(tmp_path: Path) -> None:
    config = config_of(tmp_path, *OF_STATE_DICT, f"teacher.decoder={tmp_path}/none")
    with pytest.raises(
        UserError, match=r"teacher.decoder: .*/none: has neither config.json nor vae/config.json"
    ):
        find_teacher(config)


def test_what_needs_images_says_what_to_set(tmp_path: Path) -> None:
    """Trajectories, training and the trajectory error need no decoder."""
    config = config_of(tmp_path, *OF_STATE_DICT)
    assert find_teacher(config).states.undecoded
    with pytest.raises(UserError, match=r"evaluation.metrics: fid: images are needed.* set teacher.decoder"):
        check_comparison_of(config, tmp_path)
    only_states = config_of(tmp_path, *OF_STATE_DICT, "evaluation.metrics=[trajectory_error]")
    check_comparison(only_states)
    with pytest.raises(UserError, match=r"trajectories.clip_denoised: is for images"):
        find_teacher(config_of(tmp_path, *OF_STATE_DICT, "trajectories.clip_denoised=true"))


def check_comparison_of(config: Config, folder: Path) -> None:
    """The check with a reference and weights that exist."""
    mu, sigma = np.zeros(64), np.eye(64)
    np.savez(folder / "none.npz", mu=mu, sigma=sigma)
    check_comparison(config)


def test_a_latent_unet_with_an_autoencoder(tmp_path: Path) -> None:
    """As unconditional latent diffusion has it; one whose autoencoder quantises stays refused (test_diffusers_configs.py)."""
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "scheduler")
    shutil.copytree(PIPELINE / "vae", tmp_path / "vae")
    for path in (tmp_path, tmp_path / "unet"):
        info = teacher_info(str(path))
        assert info.latent and info.decoder is not None and info.shape == SHAPE
        assert Path(info.decoder.folder) == tmp_path / "vae"


def test_a_pipeline_without_the_files_of_its_autoencoder(tmp_path: Path) -> None:
    folder = shutil.copytree(PIPELINE, tmp_path / "dit", ignore=shutil.ignore_patterns("vae"))
    info = teacher_info(str(folder))
    assert info.latent and info.decoder is None
    assert "whose files are not there: teacher.decoder names" in info.notes[0]


@pytest.mark.parametrize("decoded", [True, False])
def test_pictures_of_latents(decoded: bool, tmp_path: Path) -> None:
    """Every state is decoded, the noise too; without a decoder the first three channels are shown."""
    words = [f"teacher.path={PIPELINE}"] if decoded else OF_STATE_DICT
    config = config_of(tmp_path, *words, "trajectories.steps=4")
    teacher, student = find_teacher(config), new_student(config).eval()
    decoder = decoder_of(PIPELINE).load()
    pictured = solve_pictured(
        config, spec_of(config, teacher), student, teacher.load(), decoder if decoded else None
    )
    drawn = pictures(config, pictured, Metrics.model_validate(metrics()), teacher.states)
    plain = layout(config, teacher.states)
    assert (plain.states, plain.channels) == (("decoded", None) if decoded else ("latents", 4))
    assert plain.tile == (32 if decoded else 8)
    sheets = {name: np.array(Image.open(io.BytesIO(data))) for name, data in drawn.items()}
    noise = sample_noise(config.evaluation.seed, range(20), SHAPE)
    labels = torch.arange(10).repeat_interleave(2)
    states = student.trajectory(noise, labels, config.trajectories.time_points)

    def pixels(state: Tensor) -> np.ndarray:
        image = decoder(state[None])[0] if decoded else state[:3]
        return to_uint8(image).permute(1, 2, 0).numpy()

    def tile(name: str, x: int, y: int) -> np.ndarray:
        return sheets[name][y : y + plain.tile, x : x + plain.tile, :3].astype(int)

    gap, step = plain.gap, plain.tile + plain.gap
    at = (gap + step, gap + 9 * step)
    assert np.abs(tile("student.png", *at) - pixels(states[19, -1])).max() <= 1
    first = gap, gap + step  # the first student's row in the strips
    assert np.abs(tile("strips.png", *first) - pixels(noise[0] if decoded else noise[0] / 2)).max() <= 1
    assert np.abs(tile("strips.png", gap + step, first[1]) - pixels(states[0, 0])).max() <= 1


def whole_path(root: Path, *words: str) -> dict[str, Any]:
    """gen-trajectories, train, eval and the report; metrics.json."""
    words = ("configs/digits.yaml", f"storage.root={root}", *TINY, *LATENTS, *words)
    words = (*words, "training.picture_every=4", "training.heldout_every=2", "training.heldout_samples=8")
    done = dsno("run", *words, "--launcher", "local", timeout=900)
    assert done.returncode == 0, done.stderr
    done = dsno("report", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((root / "evaluation/digits/metrics.json").read_text())
    assert isinstance(found, dict)
    return found


def of_inception(folder: Path, sides: tuple[int, int]) -> list[str]:
    """Random weights of Inception, and random pictures as a reference."""
    weights, real = save_random_inception(folder / "inception.pth"), folder / "real"
    real.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, *sides, 3), np.uint8)):
        Image.fromarray(pixels).save(real / f"{i}.png")
    return [
        *("evaluation.metrics=[fid, trajectory_error]", "evaluation.feature_extractor=inception-v3-compat"),
        *(f"evaluation.weights_path={weights}", f"evaluation.weights_sha256={file_sha256(weights)}"),
        *("evaluation.num_samples=8", "evaluation.batch_size=4", "evaluation.teacher_steps=[1]"),
        *(f"evaluation.reference={real}", "evaluation.trajectory_samples=8", "evaluation.keep_samples=true"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["pipeline", "state dict"])
def test_the_whole_path_in_latents(teacher: str, tmp_path: Path) -> None:
    words = [*OF_STATE_DICT, f"teacher.decoder={PIPELINE}"]
    if teacher == "pipeline":
        words = [f"teacher.path={PIPELINE}"]
    words += of_inception(tmp_path, (32, 32))
    root = tmp_path / "root"
    found = whole_path(root, *words)
    decoder = decoder_of(PIPELINE)
    assert found["decoder"] == decoder.identity(SHAPE).model_dump(mode="json")
    assert found["pictures"]["states"] == "decoded" and found["pictures"]["tile"] == 32
    assert found["student"]["fid"] > 0 and len(found["student"]["trajectory_error"]) == 4
    assert [row["evaluations"] for row in found["teacher_rows"]] == [1, 6]
    assert not [warning for warning in found["warnings"] if "resizing" in warning]  # both are of 32 pixels

    (kept,) = (root / "samples").iterdir()
    shard = safetensors.torch.load_file(kept / "shard-000001.safetensors")
    student = load_student(str(root / "students/digits"))
    noise, labels = sample_noise(1, range(4, 8), SHAPE), sample_labels(1, range(4, 8), 10)
    expected = decoder.load()(student.sample(noise, labels))
    assert (shard["images"].int() - to_uint8(expected).int()).abs().max() <= 1
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["spec"]["decoder"] == found["decoder"]
    picture = Image.open(root / "students/digits/samples/step-000000004.png")
    assert picture.size[0] > 2 * 32
    assert "each is decoded" in (root / "report-digits.html").read_text()

    other = rewritten(Path(shutil.copytree(PIPELINE / "vae", tmp_path / "vae")), sample_size=64)
    again = ["configs/digits.yaml", f"storage.root={root}", *TINY, *LATENTS, *words]
    refused = answer("eval", *again, f"teacher.decoder={other}", "--launcher", "local")
    assert refused.returncode == 2 and "or of another decoder" in refused.stderr
    check_samples(root, decoder, student, tmp_path)


def check_samples(root: Path, decoder: Decoder, student: Any, folder: Path) -> None:
    """`sample` of a student by itself decodes as its config says; --states leaves states as they are."""
    at = str(root / "students/digits")
    noise, labels = sample_noise(3, range(2), SHAPE), sample_labels(3, range(2), 10)
    states = student.sample(noise, labels)
    for name, more in {"images": [], "states": ["--states"], "given": ["--decoder", str(PIPELINE)]}.items():
        out = folder / f"{name}.npz"
        done = answer("sample", at, "--num", "2", "--seed", "3", "--out", str(out), *more)
        assert done.returncode == 0, done.stderr
        with np.load(out) as arrays:
            assert sorted(arrays.files) == sorted(["labels", "states" if name == "states" else "images"])
            found = torch.from_numpy(arrays["states" if name == "states" else "images"])
        expected = states if name == "states" else to_uint8(decoder.load()(states))
        assert (found.float() - expected.float()).abs().max() <= (1e-5 if name == "states" else 1)


@pytest.mark.slow
def test_the_whole_path_of_states_without_images(tmp_path: Path) -> None:
    """Neither square nor of colours: a closed form, measured by its trajectories; pictures show the first three channels."""
    words = [
        "network.state_size=[6, 10]",
        "network.num_classes=0",
        "network.null_class=false",
        "evaluation.metrics=[trajectory_error]",
        "evaluation.reference=none.npz",
        "teacher.path=closed-form:gaussian",
        "teacher.options={mean: 0.2, std: 0.5, shape: [4, 6, 10]}",
    ]
    found = whole_path(tmp_path, *words)
    assert found["decoder"] is None and len(found["student"]["trajectory_error"]) == 4
    plain = found["pictures"]
    assert (plain["tile"], plain["tile_height"]) == (10, 6)
    assert (plain["states"], plain["channels"]) == ("latents", 4)
    assert "latents of 4 channels and not decoded" in (tmp_path / "report-digits.html").read_text()
    (data,) = (tmp_path / "trajectories").iterdir()
    inspected = answer("inspect", str(data), "--out", str(tmp_path / "inspected.png"))
    assert "(the first three of 4 channels as colours)" in inspected.stdout, inspected.stderr
    at = str(tmp_path / "students/digits")
    refused = answer("sample", at, "--out", str(tmp_path / "x.npz"))
    assert refused.returncode == 2 and "set --decoder to the folder of their AutoencoderKL" in refused.stderr
    assert answer("sample", at, "--states", "--out", str(tmp_path / "x.png")).returncode == 0
    done = answer("sample", at, "--states", "--num", "3", "--out", str(tmp_path / "x.npz"))
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["states"].shape == (3, 4, 6, 10)


@pytest.mark.slow
def test_the_whole_path_of_images_that_are_not_square(tmp_path: Path) -> None:
    words = [
        "network.state_size=[8, 12]",
        "network.state_channels=3",
        "network.num_classes=0",
        "network.null_class=false",
        "teacher.path=closed-form:gaussian",
        "teacher.options={mean: 0.2, std: 0.5, shape: [3, 8, 12]}",
        *of_inception(tmp_path, (8, 12)),
    ]
    root = tmp_path / "root"
    found = whole_path(root, *words)
    assert found["student"]["fid"] > 0 and found["decoder"] is None
    assert (found["pictures"]["tile"], found["pictures"]["tile_height"]) == (12, 8)
    assert found["reference"]["resolution"] == 8
    (kept,) = (root / "samples").iterdir()
    assert safetensors.torch.load_file(kept / "shard-000000.safetensors")["images"].shape == (4, 3, 8, 12)
    assert "decoder" not in json.loads((kept / "manifest.json").read_text())["spec"]


def test_latents_that_were_standardised_need_their_numbers(
    own_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of EDM2 would else be decoded at a wrong scale."""

    class Standardised:
        kind = "EDM"

        def info(self) -> TeacherInfo:
            return TeacherInfo(
                GaussianIdentity(mean=0, std=1, shape=SHAPE), SHAPE, 0, latent=True, standardised=True
            )

    monkeypatch.setattr(of_config, "open_teacher", lambda *_: Standardised())
    words = ["network.num_classes=0", "network.null_class=false", "teacher.path=edm2.pkl"]
    config = config_of(tmp_path, *words, f"teacher.decoder={own_vae}")
    with pytest.raises(
        UserError, match=r"teacher.decoder: .*say the numbers as latents_mean and latents_std"
    ):
        find_teacher(config)
    rewritten(
        own_vae,
        scaling_factor=1.0,
        latents_mean=[5.81, 3.25, 0.12, -2.15],
        latents_std=[8.34, 9.24, 7.42, 6.56],
    )
    assert find_teacher(config).states.decoder is not None


def test_imported_latents_are_decoded_too(own_vae: Path, tmp_path: Path) -> None:
    words = [f"trajectories.imported={'0' * 16}", "teacher.path=null", f"teacher.decoder={own_vae}"]
    states = states_of(config_of(tmp_path, *words))
    assert states.image_shape == (3, 32, 32)


def test_kept_images_are_of_one_decoder(own_vae: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, f"teacher.path={PIPELINE}")
    teacher = find_teacher(config)
    (sampling, *_) = compared_samplings(config, teacher)
    identities = [
        *(teacher.states.identity(precision) for precision in ("float32", "bfloat16")),
        open_decoder(str(rewritten(own_vae, sample_size=64)), None, 4, "x").identity(SHAPE),
    ]
    rows = [
        KeptRows(FolderStorage(tmp_path), spec_of(config, teacher), config.evaluation, of)
        for of in identities
    ]
    images = to_uint8(EXPECTED["decoded"])
    rows[0].keep(sampling, environment(), range(2), images)
    found = [row.read(sampling, environment(), range(2)) for row in rows]
    assert found[0] is not None and torch.equal(found[0], images)
    assert found[1:] == [None, None]
    specs = [
        SampleSpec(
            student="0",
            seed=1,
            samples_per_shard=2,
            threads=1,
            precision="float32",
            compile=False,
            decoder=of,
        )
        for of in (None, *identities)
    ]
    again = [SampleSpec.model_validate_json(spec.model_dump_json()) for spec in specs]
    assert again == specs and len({spec.model_dump_json() for spec in specs}) == 4
    assert "decoder" not in specs[0].model_dump()


def test_states_of_more_channels_than_colours_are_no_images() -> None:
    assert States((4, 8, 8)).undecoded and States((3, 8, 8), latent=True).undecoded
    assert not States((3, 8, 8)).undecoded and not States((1, 8, 8)).undecoded
