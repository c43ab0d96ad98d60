"""The scheduler classes of diffusers, and how the noise levels of a network follow from a scheduler's config.

Most schedulers are samplers for networks that were trained on a schedule of betas; it does not matter here which of them a
folder has, except for its own steps. Others say that a network is used in another way:

    betas        discrete levels n = 0..N-1 (`diffusion/discrete_levels.py`); the network's time is n
    edm          EDM's preconditioning of y = x0 + sigma eps (Karras et al. 2022, table 1)
    consistency  a consistency function of y, which gives the end of the trajectory in one step (Song et al. 2023)
    flow         velocities eps - x0 on the linear path (1 - sigma) x0 + sigma eps (Esser et al. 2024, section 2)
    ve           scores of y, with images in [0, 1] (Song et al. 2021, *Score-based generative modeling*, appendix C)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["betas", "edm", "consistency", "flow", "ve"]

# The keys that define a schedule of betas, with the defaults of DDIMScheduler. They are in identities and checkpoints.
BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
}
ZERO_SNR = "rescale_betas_zero_snr"
# Those of them that only choose the scheduler's own steps, not the noise levels; an option may choose others.
SAMPLER_KEYS = ("timestep_spacing", "steps_offset", "set_alpha_to_one")

# The keys of each kind that options can supply if no file says them.
KEYS: dict[Kind, tuple[str, ...]] = {
    "betas": (*BETAS, ZERO_SNR),
    "edm": ("sigma_data", "sigma_min", "sigma_max", "rho", "prediction_type"),
    "consistency": ("sigma_data", "sigma_min", "sigma_max"),
    "flow": ("num_train_timesteps", "shift"),
    "ve": ("sigma_min", "sigma_max"),
}
# What the noise levels of a kind are, for people.
LEVELS: dict[Kind, str] = {
    "betas": "come from betas",
    "edm": "are sigmas of EDM's preconditioning",
    "consistency": "are sigmas of a consistency model",
    "flow": "are those of a flow",
    "ve": "are sigmas of a variance-exploding process",
}

# Ways to choose a scheduler's own steps on betas.
ROUNDED, INTERPOLATED, MULTISTEP = "rounded timesteps", "interpolated timesteps", "multistep"


@dataclass(frozen=True)
class Class:
    """A scheduler class: its kind, its defaults where they are not those of the kind, and the way it chooses its steps.

    `steps` None: it has no steps of its own from noise to data. `time` is the network's time for kind edm.
    """

    kind: Kind
    defaults: Mapping[str, Any] = field(default_factory=dict)
    steps: str | None = None
    time: str = "log sigma / 4"


_LINSPACE = {"timestep_spacing": "linspace"}
_K_DIFFUSION = {**_LINSPACE, "beta_start": 0.00085, "beta_end": 0.012}
_EDM = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "prediction_type": "epsilon"}

SUPPORTED: dict[str, Class] = {
    "DDIMScheduler": Class("betas", steps=ROUNDED),
    "DDIMParallelScheduler": Class("betas", steps=ROUNDED),
    "DDIMInverseScheduler": Class("betas"),
    "DDPMScheduler": Class("betas", steps=ROUNDED),
    "DDPMParallelScheduler": Class("betas", steps=ROUNDED),
    "RePaintScheduler": Class("betas"),
    "UnCLIPScheduler": Class("betas", {**_LINSPACE, "beta_schedule": "squaredcos_cap_v2"}, ROUNDED),
    "PNDMScheduler": Class("betas", {"set_alpha_to_one": False}, ROUNDED),
    "EulerDiscreteScheduler": Class("betas", _LINSPACE, INTERPOLATED),
    "EulerAncestralDiscreteScheduler": Class("betas", _LINSPACE, INTERPOLATED),
    "LMSDiscreteScheduler": Class("betas", _LINSPACE, INTERPOLATED),
    "HeunDiscreteScheduler": Class("betas", _K_DIFFUSION, INTERPOLATED),
    "KDPM2DiscreteScheduler": Class("betas", _K_DIFFUSION, INTERPOLATED),
    "KDPM2AncestralDiscreteScheduler": Class("betas", _K_DIFFUSION, INTERPOLATED),
    "DPMSolverSDEScheduler": Class("betas", _K_DIFFUSION, INTERPOLATED),
    "DPMSolverMultistepScheduler": Class("betas", _LINSPACE, MULTISTEP),
    "DPMSolverMultistepInverseScheduler": Class("betas", _LINSPACE),
    "DPMSolverSinglestepScheduler": Class("betas", _LINSPACE, MULTISTEP),
    "DEISMultistepScheduler": Class("betas", {**_LINSPACE, "final_sigmas_type": "sigma_min"}, MULTISTEP),
    "SASolverScheduler": Class("betas", {**_LINSPACE, "final_sigmas_type": "sigma_min"}, MULTISTEP),
    "UniPCMultistepScheduler": Class("betas", _LINSPACE, MULTISTEP),
    "EDMEulerScheduler": Class("edm", _EDM),
    "EDMDPMSolverMultistepScheduler": Class("edm", _EDM),
    # its network time is that of OpenAI's models, for whose conversion it was written
    "KarrasEDMScheduler": Class("edm", {**_EDM, "prediction_type": "sample"}, time="250 log sigma"),
    "CosineDPMSolverMultistepScheduler": Class(
        "edm",
        {
            **_EDM,
            "sigma_data": 1.0,
            "sigma_min": 0.3,
            "sigma_max": 500.0,
            "prediction_type": "v_prediction",
            "sigma_schedule": "exponential",
        },
        time="2 / pi atan sigma",
    ),
    "CMStochasticIterativeScheduler": Class(
        "consistency", {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    ),
    "FlowMatchEulerDiscreteScheduler": Class("flow", {"num_train_timesteps": 1000, "shift": 1.0}),
    "FlowMatchHeunDiscreteScheduler": Class("flow", {"num_train_timesteps": 1000, "shift": 1.0}),
    "ScoreSdeVeScheduler": Class("ve", {"sigma_min": 0.01, "sigma_max": 1348.0}),
    "KarrasVeScheduler": Class("ve", {"sigma_min": 0.02, "sigma_max": 100.0}),
}

_DISTILLED = "its model is distilled to few steps, and is no denoiser whose ODE could be solved"
_DISCRETE = "its model generates tokens, not images by an ODE"
_VIDEO = "its models are conditional and generate video"
REFUSED: dict[str, str] = {
    "AmusedScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "DiscreteDDIMScheduler": _DISCRETE,
    "EntropyBoundScheduler": _DISCRETE,
    "VQDiffusionScheduler": _DISCRETE,
    "LCMScheduler": _DISTILLED,
    "TCDScheduler": _DISTILLED,
    "SCMScheduler": _DISTILLED,
    "FlowMatchLCMScheduler": _DISTILLED,
    "FlowMapEulerDiscreteScheduler": _DISTILLED,
    "PiflowScheduler": _DISTILLED,
    "HeliosDMDScheduler": _DISTILLED,
    "ConsistencyDecoderScheduler": "it belongs to a decoder of latents, which is conditioned on them",
    "CogVideoXDDIMScheduler": _VIDEO,
    "CogVideoXDPMScheduler": _VIDEO,
    "HeliosScheduler": _VIDEO,
    "LTXEulerAncestralRFScheduler": _VIDEO,
    "MiniMaxH3Scheduler": _VIDEO,
    "DDPMWuerstchenScheduler": "its models are conditioned on images and texts",
    "IPNDMScheduler": "its schedule is that of audio models, whose time is no discrete level",
    "RFD4ProteinaScheduler": "its models generate proteins",
    "ScoreSdeVpScheduler": "its score network's continuous time and scaling are not known here",
}
