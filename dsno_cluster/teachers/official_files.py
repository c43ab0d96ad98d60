"""Where the authors of the families publish their files, as their repositories say."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from dsno_cluster.errors import UserError, closest

_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com"
_OPENAI = "https://openaipublic.blob.core.windows.net"
_META = "https://dl.fbaipublicfiles.com"
_SIT_256 = "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"


@dataclass(frozen=True)
class Place:
    """Files whose names match `pattern` are at `url`, in which {} is their name, and need these teacher options."""

    pattern: str
    url: str
    options: dict[str, Any] = field(default_factory=dict)


PLACES = (
    Place("edm-*.pkl", f"{_NVIDIA}/edm/pretrained/{{}}"),
    Place("baseline-*.pkl", f"{_NVIDIA}/edm/pretrained/baseline/{{}}"),
    Place("edm2-img*.pkl", f"{_NVIDIA}/edm2/posthoc-reconstructions/{{}}"),
    *(
        Place(f"{name}.pt", f"{_OPENAI}/diffusion/jul-2021/{{}}")
        for name in (
            *("64x64_diffusion", "128x128_diffusion", "256x256_diffusion", "256x256_diffusion_uncond"),
            *("512x512_diffusion", "lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"),
        )
    ),
    *(
        Place(f"{name}.pt", f"{_OPENAI}/diffusion/march-2021/{{}}")
        for name in (
            *(
                "imagenet64_uncond_100M_1500K",
                "imagenet64_uncond_vlb_100M_1500K",
                "imagenet64_cond_270M_250K",
            ),
            *("cifar10_uncond_50M_500K", "cifar10_uncond_vlb_50M_500K"),
            *("lsun_uncond_100M_1200K_bs128", "lsun_uncond_100M_2400K_bs64"),
        )
    ),
    *(
        Place(f"{name}.pt", f"{_OPENAI}/consistency/{{}}")
        for name in ("edm_imagenet64_ema", "edm_bedroom256_ema", "edm_cat256_ema")
    ),
    *(
        Place(f"DiT-XL-2-{size}.pt", f"{_META}/DiT/models/{{}}", {"family": "dit"})
        for size in ("256x256", "512x512")
    ),
    Place("SiT-XL-2-256x256.pt", _SIT_256, {"family": "sit"}),
    Place("SiT-XL-2-512x512.pt", f"{_META}/SiT/models/{{}}", {"family": "sit"}),
)


def official_place(name: str) -> Place:
    """Where a file of that name is published. Raises UserError for a name that is not known."""
    for place in PLACES:
        if fnmatchcase(name, place.pattern):
            return Place(place.pattern, place.url.format(name), place.options)
    near = closest(name, [place.pattern for place in PLACES])
    hint = f"did you mean {near}?" if near else "the files known by name are listed in docs/teacher-files.md"
    raise UserError(
        f"{name}: is no OWNER/NAME of a repository on the Hugging Face hub, no URL, and no published file known here; {hint}"
    )
