"""Files of diffusers folders as people have them, and folders that are damaged or contradict themselves."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers_folders import narrow, of_json, randomized, saved_scheduler, write
from teacher_models import one_thread as one_thread  # fixture
from teacher_models import relative
from tiny import answer
from torch import Tensor

from dsno_cluster import load_teacher
from dsno_cluster.errors import UserError
from dsno_cluster.teachers import Teacher, teacher_info

diffusers = pytest.importorskip("diffusers")
CONFIG = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "num_class_embeds": 3,
}
NAME = "diffusion_pytorch_model"


@pytest.fixture(name="unet", scope="module")
def network() -> Any:
    return randomized(diffusers.UNet2DModel.from_config(CONFIG))


@pytest.fixture(name="folder")
def pipeline(unet: Any, tmp_path: Path) -> Path:
    write(tmp_path / "teacher", unet, CONFIG, saved_scheduler(diffusers.DDPMScheduler()))
    return tmp_path / "teacher"


def x0(teacher: Teacher) -> Tensor:
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    return teacher(x, 0.6, torch.tensor([0, 2]))


def state(unet: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.to(dtype).contiguous() for name, tensor in unet.state_dict().items()}


def test_forms_of_weights(unet: Any, folder: Path) -> None:
    """The same network from safetensors and `.bin`, whole and in parts; float32 is preferred to variants."""
    expected, weights = x0(load_teacher(str(folder))), folder / f"unet/{NAME}.safetensors"
    half = {name: tensor.float() for name, tensor in state(unet, torch.float16).items()}
    weights.unlink()
    names = sorted(half)
    parts = {f"{NAME}-00001-of-00002.bin": names[:10], f"{NAME}-00002-of-00002.bin": names[10:]}
    for part, included in parts.items():
        torch.save({name: unet.state_dict()[name] for name in included}, folder / "unet" / part)
    index = {"weight_map": {name: part for part, included in parts.items() for name in included}}
    (folder / f"unet/{NAME}.bin.index.json").write_text(json.dumps(index))
    assert torch.equal(x0(load_teacher(str(folder))), expected)
    assert teacher_info(str(folder)).notes == ()
    safetensors.torch.save_file(state(unet, torch.float16), folder / f"unet/{NAME}.fp16.safetensors")
    assert torch.equal(x0(load_teacher(str(folder))), expected)
    (folder / f"unet/{NAME}.bin.index.json").unlink()
    (note,) = teacher_info(str(folder)).notes
    assert "variant fp16" in note
    halved = x0(load_teacher(str(folder)))
    assert 0 < relative(halved, expected) < 1e-2
    shutil.rmtree(folder / "unet")
    rounded = diffusers.UNet2DModel.from_config(CONFIG)
    rounded.load_state_dict(half)
    write(folder, rounded, CONFIG, saved_scheduler(diffusers.DDPMScheduler()))
    assert torch.equal(x0(load_teacher(str(folder))), halved)  # computed in float32
    torch.save(state(unet, torch.float16), folder / f"unet/{NAME}.fp16.bin")
    weights.unlink()
    assert torch.equal(x0(load_teacher(str(folder))), halved)


def test_parts_of_a_variant_as_diffusers_saves_them(unet: Any, folder: Path) -> None:
    expected = x0(load_teacher(str(folder)))
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="20KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert torch.equal(x0(load_teacher(str(folder))), expected)  # saved in float32 under that name
    (note,) = teacher_info(str(folder)).notes
    assert "variant fp16" in note


def test_moving_averages(unet: Any, folder: Path) -> None:
    """`unet/` is what `model_index.json` names; the average beside it is taken on request."""
    from diffusers.training_utils import EMAModel

    plain = x0(load_teacher(str(folder)))
    with pytest.raises(UserError, match="option ema is true, but there is no unet_ema/"):
        load_teacher(str(folder), options={"ema": True})
    other = randomized(diffusers.UNet2DModel.from_config(CONFIG), seed=5)
    average = EMAModel(other.parameters(), model_cls=diffusers.UNet2DModel, model_config=other.config)
    average.save_pretrained(folder / "unet_ema")
    assert "optimization_step" in of_json(folder / "unet_ema/config.json")
    assert torch.equal(x0(load_teacher(str(folder))), plain)
    assert torch.equal(x0(load_teacher(str(folder), options={"ema": False})), plain)
    averaged = load_teacher(str(folder), options={"ema": True})
    assert relative(x0(averaged), plain) > 0.1
    assert averaged.info.notes == ("the teacher's weights are the moving average in unet_ema/",)
    assert torch.equal(x0(load_teacher(f"{folder}/unet_ema")), x0(averaged))


def test_attention_of_old_diffusers_in_bin_files(unet: Any, folder: Path) -> None:
    """Other names, and matrices as 1x1 convolutions."""
    expected = x0(load_teacher(str(folder)))
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, tensor in state(unet).items():
        for new, before in old.items():
            if new in name:
                name, tensor = (
                    name.replace(new, before),
                    tensor[..., None, None] if tensor.ndim == 2 else tensor,
                )
        weights[name] = tensor
    assert sum(tensor.ndim == 4 and ".key." in name for name, tensor in weights.items()) > 1
    (folder / f"unet/{NAME}.safetensors").unlink()
    torch.save(weights, folder / f"unet/{NAME}.bin")
    assert torch.equal(x0(load_teacher(str(folder))), expected)


def test_classes_as_numbers(folder: Path) -> None:
    """A class embedding of kind `timestep` does not say how many classes there are."""
    config = {**CONFIG, "class_embed_type": "timestep", "num_class_embeds": None}
    unet = randomized(diffusers.UNet2DModel.from_config(config))
    path = write(folder, unet, config, saved_scheduler(diffusers.DDPMScheduler(prediction_type="sample")))
    teacher = load_teacher(path, options={"num_classes": 4})
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    with torch.no_grad():
        expected = unet(x, torch.tensor(999), labels).sample
    assert teacher.num_classes == 4
    assert relative(teacher(x, 1.0, labels), expected) < 1e-5


def test_the_scheduler_by_options(unet: Any, tmp_path: Path) -> None:
    """What no file says, options do: the class, too."""
    write(tmp_path / "a", unet, CONFIG, saved_scheduler(diffusers.EDMEulerScheduler(sigma_max=30.0)))
    unet.save_pretrained(tmp_path / "b")
    alone = str(tmp_path / "b")
    expected = x0(load_teacher(str(tmp_path / "a")))
    given = {"scheduler": "EDMEulerScheduler", "sigma_max": 30}
    assert torch.equal(x0(load_teacher(alone, options=given)), expected)
    with pytest.raises(UserError, match="as DDIMScheduler has betas, also give options prediction_type"):
        load_teacher(alone, options={"scheduler": "DDIMScheduler"})
    betas = {"scheduler": "DDIMScheduler", "prediction_type": "epsilon", "beta_schedule": "linear"}
    assert relative(x0(load_teacher(alone, options=betas)), expected) > 0.1


def test_what_was_recorded_before_is_found(unet: Any, tmp_path: Path) -> None:
    """An old Euler config has no spacing: diffusers' default is linspace, earlier versions recorded leading."""
    config = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear"}
    info = teacher_info(write(tmp_path, unet, CONFIG, config))
    (former,) = info.former_identities
    assert info.identity.scheduler["timestep_spacing"] == "linspace"
    assert former.scheduler == {**info.identity.scheduler, "timestep_spacing": "leading"}
    assert not teacher_info(
        write(tmp_path, unet, CONFIG, {**config, "timestep_spacing": "trailing"})
    ).former_identities


Change = Callable[[Path], Any]


class Runs:
    """Makes a file if it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("must-not-be-there"),))


def change(file: str, **values: Any) -> Change:
    def apply(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(of_json(path) | values))

    return apply


def text(file: str, content: str) -> Change:
    return lambda folder: (folder / file).write_text(content)


def gone(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


def bin_of(content: Any) -> Change:
    def apply(folder: Path) -> None:
        (folder / f"unet/{NAME}.safetensors").unlink()
        torch.save(content, folder / f"unet/{NAME}.bin")

    return apply


def index_of(weight_map: Any, suffix: str = "safetensors") -> Change:
    def apply(folder: Path) -> None:
        (folder / f"unet/{NAME}.safetensors").rename(folder / f"unet/one.{suffix}")
        content = {"weight_map": weight_map} if weight_map is not None else {}
        (folder / f"unet/{NAME}.{suffix}.index.json").write_text(json.dumps(content))

    return apply


def cut(folder: Path) -> None:
    file = folder / f"unet/{NAME}.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def cut_bin(folder: Path) -> None:
    bin_of({"conv_in.weight": torch.zeros(100)})(folder)
    file = folder / f"unet/{NAME}.bin"
    file.write_bytes(file.read_bytes()[:-30])


def plain_pickle(folder: Path) -> None:
    (folder / f"unet/{NAME}.safetensors").unlink()
    buffer = io.BytesIO()
    pickle.dump(Runs(), buffer, protocol=2)
    (folder / f"unet/{NAME}.bin").write_bytes(buffer.getvalue())


def without(name: str) -> Change:
    def apply(folder: Path) -> None:
        file = folder / f"unet/{NAME}.safetensors"
        tensors = safetensors.torch.load_file(file)
        del tensors[name]
        safetensors.torch.save_file(tensors, file)

    return apply


def not_finite(folder: Path) -> None:
    file = folder / f"unet/{NAME}.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["conv_in.bias"][0] = float("nan")
    safetensors.torch.save_file(tensors, file)


def component(name: str, content: str = "{}") -> Change:
    def apply(folder: Path) -> None:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)

    return apply


SCHEDULER = "scheduler/scheduler_config.json"
UNET, INDEX = "unet/config.json", "model_index.json"
KARRAS = {"_class_name": "KarrasEDMScheduler", "sigma_min": 0.002, "sigma_max": 80.0}


def edm(**values: Any) -> Change:
    """The scheduler's file replaced by one of EDM, which `model_index.json` names."""

    def apply(folder: Path) -> None:
        (folder / SCHEDULER).write_text(json.dumps({**KARRAS, **values}))
        change(INDEX, scheduler=["diffusers", KARRAS["_class_name"]])(folder)

    return apply


FAULTS: dict[str, tuple[Change, dict[str, Any], str]] = {
    "no config": (gone(UNET), {}, "has no unet/config.json, though model_index.json names its unet"),
    "no scheduler": (gone(SCHEDULER), {}, r"has no scheduler_config\.json"),
    "config is no JSON": (text(UNET, "{'a': 1}"), {}, "config.json: not JSON"),
    "config is a list": (text(UNET, "[1]"), {}, "config.json: holds list, not an object"),
    "config is a web page": (text(UNET, "<!doctype html><p>no"), {}, "config.json: is a web page"),
    "config is nested too deeply": (text(UNET, '{"a":' + "[" * 100000), {}, "config.json: not JSON"),
    "index is no JSON": (text(INDEX, "{"), {}, "model_index.json: not JSON"),
    "index names a number": (
        change(INDEX, unet=[1, 2]),
        {},
        r"model_index.json: unet is \[1, 2\], not a library",
    ),
    "index names a word": (
        change(INDEX, scheduler="DDPM"),
        {},
        "scheduler is 'DDPM', not a library and a class",
    ),
    "another model": (change(UNET, _class_name="UNet1DModel"), {}, "'UNet1DModel' is not supported"),
    "text encoder": (component("text_encoder"), {}, "is conditioned on text"),
    "text in the index": (
        change(INDEX, tokenizer=["transformers", "BertTokenizer"]),
        {},
        "conditioned on text",
    ),
    "latents": (
        component("vae", '{"_class_name": "AutoencoderKL"}'),
        {},
        "decodes latents of 4 channels, and the states have 3",
    ),
    "movq in the index": (change(INDEX, movq=["diffusers", "VQModel"]), {}, r"latents of movq/ \(VQModel\)"),
    "unknown scheduler": (
        change(INDEX, scheduler=["mine", "EDMEulerSchedular"]),
        {},
        "EDMEulerSchedular is no scheduler class .* mean EDMEuler",
    ),
    "refused scheduler": (
        change(INDEX, scheduler=["diffusers", "LCMScheduler"]),
        {},
        "LCMScheduler is not supported: .* distilled",
    ),
    "index against file": (
        change(INDEX, scheduler=["diffusers", "EDMEulerScheduler"]),
        {},
        "scheduler_config.json says DDPMScheduler, but model_index.json says EDMEulerScheduler",
    ),
    "file against index": (
        change(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"),
        {},
        "cannot both be right",
    ),
    "option against scheduler": (
        lambda _: None,
        {"scheduler": "EDMEulerScheduler"},
        "option scheduler is 'EDMEulerScheduler', but the folder has DDPMScheduler",
    ),
    "option against file": (
        lambda _: None,
        {"prediction_type": "v_prediction"},
        "option prediction_type is 'v_prediction', but scheduler/scheduler_config.json says 'epsilon'",
    ),
    "option against classes": (
        lambda _: None,
        {"num_classes": 7},
        "option num_classes is 7, but config.json says num_class_embeds 3",
    ),
    "betas for EDM": (
        edm(),
        {"beta_schedule": "linear"},
        "option beta_schedule is 'linear', but KarrasEDMScheduler .* has no beta_schedule",
    ),
    "betas for EDM without a file": (
        lambda f: (edm()(f), gone(SCHEDULER)(f)),
        {"beta_schedule": "linear", "prediction_type": "epsilon"},
        "KarrasEDMScheduler in model_index.json has no",
    ),
    "sigmas for betas": (
        lambda _: None,
        {"sigma_data": 0.5},
        "DDPMScheduler .* has no sigma_data: its noise levels come from betas",
    ),
    "sigma_data against EDM": (
        edm(sigma_data=0.5),
        {"sigma_data": 1.0},
        "option sigma_data is 1.0, but .* says 0.5",
    ),
    "sigmas upside down": (edm(sigma_min=90), {}, "sigma_min 90.0 .* must be below sigma_max 80.0"),
    "sigma is a word": (
        edm(sigma_data="half"),
        {},
        "sigma_data 'half' in scheduler/scheduler_config.json must be a number above 0",
    ),
    "another preconditioning": (edm(precondition_type="vp"), {}, "precondition_type 'vp' .* is not 'edm'"),
    "betas are NaN": (change(SCHEDULER, trained_betas=[float("nan")] * 1000), {}, "each above 0 and below 1"),
    "betas are words": (change(SCHEDULER, trained_betas=["a"]), {}, "trained_betas .* is no list of numbers"),
    "too few betas": (change(SCHEDULER, trained_betas=[0.1, 0.2]), {}, "2 betas, 1000 expected"),
    "beta is NaN": (change(SCHEDULER, beta_end=float("nan")), {}, "beta_end nan .* must be a number above 0"),
    "beta is none": (change(SCHEDULER, beta_start=None), {}, "beta_start None .* must be a number above 0"),
    "betas of 2": (change(SCHEDULER, beta_end=2.0), {}, "each above 0 and below 1"),
    "unknown betas": (
        change(SCHEDULER, beta_schedule="mine"),
        {},
        "beta_schedule 'mine' is not one of: linear, .*laplace",
    ),
    "unknown prediction": (
        change(SCHEDULER, prediction_type="score"),
        {},
        "prediction_type 'score' is not one of",
    ),
    "no timesteps": (
        change(SCHEDULER, num_train_timesteps="many"),
        {},
        "num_train_timesteps 'many' must be 2 or more",
    ),
    "offset is a word": (change(SCHEDULER, steps_offset="a"), {}, "steps_offset 'a' must be a whole number"),
    "unknown spacing": (
        change(SCHEDULER, timestep_spacing="log"),
        {},
        "timestep_spacing 'log' is not one of",
    ),
    "channels": (change(UNET, in_channels=9), {}, "9 channels in, 3 out"),
    "channels are words": (change(UNET, out_channels="three"), {}, "are no numbers of channels"),
    "classes are words": (change(UNET, num_class_embeds="ten"), {}, "num_class_embeds 'ten' is no number"),
    "blocks that do not exist": (
        change(UNET, down_block_types=["NoBlock2D", "DownBlock2D"]),
        {},
        "no network can be built of its config.json: diffusers says",
    ),
    "blocks of two lengths": (
        change(UNET, block_out_channels=[8]),
        {},
        "no network can be built of its config.json: diffusers says",
    ),
    "groups that do not divide": (change(UNET, norm_num_groups=3), {}, "no network can be built"),
    "wrong widths": (
        change(UNET, block_out_channels=[16, 32]),
        {},
        "does not fit its config.json: .* has shape",
    ),
    "missing tensor": (without("conv_out.weight"), {}, "conv_out.weight is missing"),
    "not finite": (not_finite, {}, "conv_in.bias holds numbers that are not finite"),
    "no weights": (
        gone(f"unet/{NAME}.safetensors"),
        {},
        "no weights: .* has no diffusion_pytorch_model.safetensors or .bin",
    ),
    "weights cut off": (cut, {}, "is cut off"),
    "bin cut off": (cut_bin, {}, "bin: is cut off"),
    "weights are a pointer": (
        text(f"unet/{NAME}.safetensors", "version https://git-lfs.github.com/spec/v1"),
        {},
        "is a Git LFS pointer",
    ),
    "bin with code": (bin_of({"a": Runs()}), {}, "could run code"),
    "bin is a pickle with code": (plain_pickle, {}, r"\.bin: "),
    "bin holds a list": (bin_of([torch.zeros(2)]), {}, "bin: holds list, not tensors by name"),
    "bin is nested": (bin_of({"state_dict": {"a": torch.zeros(2)}}), {}, "not tensors by name"),
    "index without a map": (index_of(None), {}, "has no weight_map that names files"),
    "index with a list": (index_of(["one"]), {}, "has no weight_map that names files"),
    "index names an absent file": (
        index_of({"conv_in.weight": "two.safetensors"}),
        {},
        "two.safetensors: is missing, though",
    ),
    "index names another folder": (
        index_of({"conv_in.weight": "../one.safetensors"}),
        {},
        "names '../one.safetensors', which is no .safetensors file beside it",
    ),
    "index names a pickle": (
        index_of({"conv_in.weight": "one.bin"}),
        {},
        "names 'one.bin', which is no .safetensors file",
    ),
    "ema is a word": (lambda _: None, {"ema": "yes"}, "option ema 'yes' is not one of: true, false"),
    "unknown option": (lambda _: None, {"betas": 1}, "unknown teacher option betas"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_folders(fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what is wrong; nothing of the files runs."""
    monkeypatch.chdir(folder.parent)
    apply, options, message = FAULTS[fault]
    apply(folder)
    with pytest.raises(UserError, match=message) as refused:
        load_teacher(str(folder), options=options)
    assert "\n" not in str(refused.value)
    assert folder.name in str(refused.value)
    assert not Path("must-not-be-there").exists()


@pytest.mark.parametrize(
    "fault",
    ["betas for EDM", "latents", "index names an absent file", "weights cut off", "option against file"],
)
def test_faulty_folders_on_the_command_line(fault: str, folder: Path) -> None:
    apply, options, _ = FAULTS[fault]
    apply(folder)
    words = ["network.state_channels=3", "network.num_classes=3", f"teacher.path={folder}"]
    refused = answer("plan", *words, f"teacher.options={json.dumps(options)}", cwd=folder)
    assert refused.returncode == 2, refused.stderr
    lines = [line for line in refused.stderr.splitlines() if "teacher.path" in line]
    assert len(lines) == 1, refused.stderr


def test_a_narrowed_config_keeps_its_flags() -> None:
    """What the tests of public configs rely on."""
    wide = {**CONFIG, "block_out_channels": [128, 128, 256], "freq_shift": 1}
    assert narrow(wide)["block_out_channels"] == [8, 8, 16] and narrow(wide)["freq_shift"] == 1
