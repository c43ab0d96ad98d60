"""Narrow networks built from the configs of public repositories: x0 is that of diffusers' own schedulers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_folders import CONFIGS, narrow, of_json, randomized, time_of, write
from teacher_models import one_thread as one_thread  # fixture
from teacher_models import relative
from torch import Tensor

from dsno_cluster import load_teacher, solve
from dsno_cluster.errors import UserError
from dsno_cluster.teachers import Teacher, teacher_info

diffusers = pytest.importorskip("diffusers")
ROOT = sorted(folder.name for folder in CONFIGS.iterdir() if (folder / "config.json").exists())
PIPELINES = sorted(
    folder.name
    for folder in CONFIGS.iterdir()
    if (folder / "scheduler").exists() and (folder / "unet").exists()
)
ADM = "lukasz-staniszewski__adm-imagenet-256x256-unconditional"
LATENT = "CompVis__ldm-celebahq-256"
EDM = "dg845__diffusers-cm_edm_imagenet64_ema"
DIT = "facebook__DiT-XL-2-256"
TIMESTEPS = (0, 1, 120, 650, 999)


def test_every_config_is_tried() -> None:
    assert {*ROOT, *PIPELINES, ADM, DIT} == {folder.name for folder in CONFIGS.iterdir()}


def unet_of(config: dict[str, Any]) -> Any:
    return randomized(diffusers.UNet2DModel.from_config(config))


def released(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the names of blocks that diffusers was released with: see `architecture-of__...-main`."""
    text = json.dumps(config).replace("AttnDownsample", "AttnDown").replace("AttnUpsample", "AttnUp")
    changed = json.loads(text)
    if changed != config:
        changed |= {"downsample_type": "resnet", "upsample_type": "resnet"}
        assert changed == of_main(changed)
    return changed


def of_main(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the blocks that the repository has today."""
    main = of_json(CONFIGS / "architecture-of__openai-diffusers-cd_ct_lsun256-main/unet/config.json")
    keys = (
        "down_block_types",
        "up_block_types",
        "downsample_type",
        "upsample_type",
        "resnet_time_scale_shift",
    )
    return config | {key: main[key] for key in keys}


def images(teacher: Teacher) -> tuple[Tensor, Tensor | None]:
    """Noisy images for it, and labels if it has classes."""
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, teacher.num_classes - 1]) if teacher.num_classes else None


@torch.no_grad()
def check_betas(teacher: Teacher, network: Any, scheduler: Any) -> None:
    """Its x0 is the scheduler's pred_original_sample of the network's output."""
    x, labels = images(teacher)
    scheduler.set_timesteps(1000)
    for n in TIMESTEPS:
        signal = float(scheduler.alphas_cumprod[n])
        output = network(x, torch.tensor(n), class_labels=labels, return_dict=False)[0]
        expected = scheduler.step(output, n, x).pred_original_sample
        assert relative(teacher(x, time_of(math.sqrt((1 - signal) / signal)), labels), expected) < 1e-4, n


def without_clipping(config: dict[str, Any], **more: Any) -> Any:
    """diffusers' scheduler of that config, which does not bound the clean image."""
    wanted = {**config, "clip_sample": False, "thresholding": False, "clip_denoised": False, **more}
    return getattr(diffusers, config["_class_name"]).from_config(wanted)


@pytest.mark.parametrize("name", ROOT)
def test_files_at_the_root(name: str, tmp_path: Path) -> None:
    """As google's repositories have them: `.bin` weights beside the configs."""
    config = narrow(of_json(CONFIGS / name / "config.json"))
    unet = unet_of(config)
    torch.save(unet.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(CONFIGS / name / "scheduler_config.json", tmp_path)
    check_betas(
        load_teacher(str(tmp_path)), unet, without_clipping(of_json(tmp_path / "scheduler_config.json"))
    )
    assert teacher_info(str(tmp_path)).clips


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != LATENT])
def test_pipelines(name: str, tmp_path: Path) -> None:
    config = narrow(of_json(CONFIGS / name / "unet/config.json"))
    scheduler = of_json(CONFIGS / name / "scheduler/scheduler_config.json")
    unet = unet_of(released(config))
    teacher = load_teacher(write(tmp_path, unet, config, scheduler))
    if scheduler["_class_name"] == "CMStochasticIterativeScheduler":
        check_consistency(teacher, unet, without_clipping(scheduler))
    elif scheduler["_class_name"] == "KarrasEDMScheduler":
        check_karras_edm(teacher, unet)
    else:
        check_betas(teacher, unet, without_clipping(scheduler))


@torch.no_grad()
def check_consistency(teacher: Teacher, unet: Any, scheduler: Any) -> None:
    """A consistency model: the scheduler's output, and one step, which is what its pipeline does."""
    x, labels = images(teacher)
    count = scheduler.config.num_train_timesteps
    for timestep in (0, count // 2, count - 1):
        scheduler.set_timesteps(timesteps=[timestep])
        (sigma, t) = float(scheduler.sigmas[0]), scheduler.timesteps[0]
        y = x * math.sqrt(1 + sigma**2)
        output = unet(scheduler.scale_model_input(y, t), t, class_labels=labels).sample
        expected = scheduler.step(output, t, y).prev_sample
        assert relative(teacher(x, time_of(sigma), labels), expected) < 1e-4, sigma
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    y = x * scheduler.init_noise_sigma
    output = unet(scheduler.scale_model_input(y, t), t, class_labels=labels).sample
    expected = scheduler.step(output, t, y).prev_sample
    assert relative(solve(teacher, x, [0.0], "ddim", 1, labels)[:, 0], expected) < 1e-4
    assert teacher.num_steps == 1 and teacher.distilled


@torch.no_grad()
def check_karras_edm(teacher: Teacher, unet: Any) -> None:
    """This scheduler is in no released diffusers; its coefficients are those of EDMEulerScheduler, its time is that of
    OpenAI's consistency models."""
    edm, time = diffusers.EDMEulerScheduler(), diffusers.CMStochasticIterativeScheduler()
    x, labels = images(teacher)
    for sigma in (0.002, 0.05, 1.0, 11.0, 80.0):
        y = x * math.sqrt(1 + sigma**2)
        t = torch.tensor(time.sigma_to_t(sigma), dtype=torch.float32)
        output = unet(edm.precondition_inputs(y, torch.tensor(sigma)), t, labels)
        expected = edm.precondition_outputs(y, output.sample, torch.tensor(sigma))
        assert relative(teacher(x, time_of(sigma), labels), expected) < 1e-4, sigma


class LegacyAttention:
    """Attention as ADM's legacy order has it: the joint output is cut by heads first, then into query, key and value."""

    def __call__(self, attn: Any, hidden_states: Tensor, temb: Tensor | None = None, **_: Any) -> Tensor:
        n, c, h, w = hidden_states.shape
        x = hidden_states.reshape(n, c, h * w)
        y = (attn.group_norm(x) if attn.group_norm else x).transpose(1, 2)
        joint = torch.cat([attn.to_q(y), attn.to_k(y), attn.to_v(y)], dim=2).transpose(1, 2)
        q, k, v = joint.reshape(n * attn.heads, 3 * c // attn.heads, h * w).split(c // attn.heads, dim=1)
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(c // attn.heads), dim=-1)
        mixed = torch.einsum("bij,bcj->bci", weights, v).reshape(n, c, h * w).transpose(1, 2)
        out: Tensor = attn.to_out[0](mixed).transpose(1, 2).reshape(n, c, h, w)
        return (out + hidden_states) / attn.rescale_output_factor


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_adm_as_a_fork_of_diffusers_converts_it(legacy: bool, normalised: bool, tmp_path: Path) -> None:
    """A learned variance, of which nothing is used, ADM's embedding of time, and its legacy order of attention.

    Whether the middle attention is normalised, only the weights say.
    """
    config = {**narrow(of_json(CONFIGS / ADM / "unet/config.json")), "attention_legacy_order": legacy}
    known = {**config, "time_embedding_type": "positional"}
    assert config["attn_norm_num_groups"] is None
    known["attn_norm_num_groups"] = 4 if normalised else None
    known.pop("attention_legacy_order")
    unet = unet_of(known)
    assert config["time_embedding_type"] == "adm" and config["out_channels"] == 6
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "unet/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no scheduler_config"):
        load_teacher(str(tmp_path))
    options = {"prediction_type": "epsilon", "beta_schedule": "linear"}
    teacher = load_teacher(str(tmp_path), options=options)
    if legacy:
        for module in unet.modules():
            if hasattr(module, "to_q"):
                module.set_processor(LegacyAttention())
    check_betas(teacher, unet, scheduler)


def test_a_latent_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has three channels, and would pass for a teacher of images."""
    config = narrow(of_json(CONFIGS / LATENT / "unet/config.json"))
    path = write(
        tmp_path / "ldm",
        unet_of(config),
        config,
        of_json(CONFIGS / LATENT / "scheduler/scheduler_config.json"),
    )
    load_teacher(path)  # nothing says that it is latent
    (tmp_path / "ldm/vqvae").mkdir()
    (tmp_path / "ldm/vqvae/config.json").write_text('{"_class_name": "VQModel"}')
    monkeypatch.chdir(f"{path}/unet")
    for place in (path, f"{path}/unet", "."):
        with pytest.raises(
            UserError, match=r"is a latent diffusion model: .* vqvae/ \(VQModel\), not images"
        ):
            load_teacher(place)
    shutil.rmtree(tmp_path / "ldm/vqvae")
    index = of_json(tmp_path / "ldm/model_index.json") | {"vqvae": ["diffusers", "VQModel"]}
    (tmp_path / "ldm/model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is a latent diffusion model"):
        teacher_info(path)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_dit_pipeline(name: str, tmp_path: Path) -> None:
    """Its states are latents; the null class is the row after the last class."""
    config = of_json(CONFIGS / DIT / "transformer/config.json") | {"_class_name": name}
    config |= {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 2, "sample_size": 8}
    config |= {"num_embeds_ada_norm": 6}
    dit = randomized(
        diffusers.DiTTransformer2DModel.from_config({**config, "_class_name": "DiTTransformer2DModel"})
    )
    dit.save_pretrained(tmp_path / "transformer", safe_serialization=False)
    (tmp_path / "transformer/config.json").write_text(json.dumps(config))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.save_pretrained(tmp_path / "scheduler")
    listed = {
        "transformer": ["diffusers", name],
        "vae": ["diffusers", "AutoencoderKL"],
        "id2label": {"0": "a"},
    }
    (tmp_path / "model_index.json").write_text(json.dumps(listed))
    teacher = load_teacher(str(tmp_path))
    assert (teacher.shape, teacher.num_classes, teacher.null_class) == ((4, 8, 8), 6, 6)

    def network(x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (dit(x, t.expand(len(x)), class_labels=class_labels, return_dict=return_dict)[0][:, :4],)

    check_betas(teacher, network, scheduler)
    x, _ = images(teacher)
    assert torch.equal(teacher(x, 0.5), teacher(x, 0.5, torch.tensor([6, 6])))
    (note,) = teacher.info.notes
    assert "latents of vae/ (AutoencoderKL)" in note
    assert load_teacher(f"{tmp_path}/transformer").shape == (4, 8, 8)
    for key, value in {"sample_size": 16, "null_class": 5, "num_classes": 5}.items():
        with pytest.raises(UserError, match=f"option {key} is {value}, but config.json says"):
            load_teacher(str(tmp_path), options={key: value})


def test_half_precision_of_an_edm_teacher(tmp_path: Path) -> None:
    config = narrow(of_json(CONFIGS / EDM / "unet/config.json"))
    path = write(
        tmp_path, unet_of(config), config, of_json(CONFIGS / EDM / "scheduler/scheduler_config.json")
    )
    teacher, fast = load_teacher(path), load_teacher(path, precision="bfloat16")
    x, labels = images(teacher)
    for t in (0.2, 0.9, 1.0):
        assert 0 < relative(fast(x, t, labels), teacher(x, t, labels)) < 0.05
