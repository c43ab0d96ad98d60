"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, *Analyzing and Improving the Training Dynamics of Diffusion
Models*, section 2 and appendix B): every layer keeps the expected magnitude of its activations.

There are no biases and no group norms. Each filter of a layer is normalised when it is used (equation 47), sums and
concatenations are weighted (equations 88 and 103), and a channel of ones beside the image stands for biases. Parameters are
named as in EDM2's checkpoints; `attn_qkv` gives [q | k | v] of head 0, then of head 1, and so on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_cluster.networks.edm_layers import Resample, decoder_blocks, one_hot, to_images
from dsno_cluster.networks.edm_settings import EDM2Settings

EPS = 1e-4
SILU_GAIN = 1 / 0.596  # silu(n) of a normal n has magnitude 0.596 (equation 81)


def normal_magnitude(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x scaled so that its mean square over `dim` is 1, up to a small constant in the divisor; computed in float32."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    root = math.sqrt(x.numel() // length.numel())
    scale: Tensor = 1.0 / (EPS + length / root)
    return x * scale.to(x.dtype)


def silu(x: Tensor) -> Tensor:
    return F.silu(x) * SILU_GAIN


def blend(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a and b added with weights 1 - t and t, then brought back to unit magnitude (equation 88)."""
    # not torch.add with an alpha: torch 2.14 compiles that wrongly if b is a matrix product
    return torch.lerp(a, b, t) * (1.0 / math.hypot(1.0 - t, t))


def join(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a and b concatenated, so that they contribute with weights 1 - t and t (equation 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    root = math.sqrt((n_a + n_b) / ((1.0 - t) ** 2 + t**2))
    return torch.cat([a * (root / math.sqrt(n_a) * (1.0 - t)), b * (root / math.sqrt(n_b) * t)], dim=1)


class MPLayer(nn.Module):
    """A convolution, or with `kernel` 0 a linear layer, without bias, whose filters have unit magnitude.

    After `fix_filters` its `weight` is what it multiplies by; before, each filter is normalised when it is used.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, *([kernel, kernel] if kernel else [])))
        self.fixed = False

    def filters(self) -> Tensor:
        """The weights that it multiplies by, in the dtype of `weight`."""
        if self.fixed:
            return self.weight
        fan_in = self.weight[0].numel()
        normal = normal_magnitude(self.weight.float(), tuple(range(1, self.weight.dim())))
        return (normal / math.sqrt(fan_in)).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        w = self.filters()
        return F.linear(x, w) if w.dim() == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


@torch.no_grad()
def fix_filters(network: nn.Module) -> None:
    """Normalise the filters of every layer once, for a network that is not trained further."""
    for module in network.modules():
        if isinstance(module, MPLayer):
            module.weight.copy_(module.filters())
            module.fixed = True


def train_filters(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Undo `fix_filters`, with the network's own weights: each filter is normalised again whenever it is used.

    EDM2's own training also overwrites the weights by the normalised filters at each step, which keeps the effective learning
    rate from falling as the weights grow (section 2.3). That is left out: DeepSpeed trains other copies of the weights. The
    function of the network does not depend on their magnitudes.
    """
    network.load_state_dict(weights)
    for module in network.modules():
        if isinstance(module, MPLayer):
            module.fixed = False


class MPFourier(nn.Module):
    """Cosines of random frequencies and phases, which belong to the checkpoint; float32 (equation 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, noise_N: Tensor) -> Tensor:
        angle = noise_N.float()[:, None] * self.freqs.float() + self.phases.float()
        return angle.cos() * math.sqrt(2.0)


class MPBlock(nn.Module):
    """A residual block of the encoder or decoder (figure 21), with self-attention if it has `heads`.

    In the encoder the main path is projected and normalised first; in the decoder it is projected after the branch has
    left it.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding: int,
        settings: EDM2Settings,
        *,
        encoder: bool,
        resample: str = "",
        heads: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.heads, self.settings = encoder, heads, settings
        self.resample = Resample(resample, settings.resample_filter) if resample else nn.Identity()
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPLayer(c_out if encoder else c_in, c_out, 3)
        self.emb_linear = MPLayer(embedding, c_out)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv_res1 = MPLayer(c_out, c_out, 3)
        self.conv_skip = MPLayer(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        if heads:
            self.attn_qkv, self.attn_proj = MPLayer(c_out, 3 * c_out, 1), MPLayer(c_out, c_out, 1)

    def forward(self, x_NCHW: Tensor, embedding_NE: Tensor) -> Tensor:
        x = self.resample(x_NCHW)
        if self.encoder:
            x = normal_magnitude(self.conv_skip(x), 1)
        embedded = self.emb_linear(embedding_NE)
        scale = embedded * self.emb_gain.to(embedded.dtype) + 1.0
        h = silu(self.conv_res0(silu(x)) * scale[:, :, None, None])
        h = self.conv_res1(self.dropout(h))
        if not self.encoder:
            x = self.conv_skip(x)
        x = blend(x, h, self.settings.res_balance)
        if self.heads:
            x = blend(x, self.attn_proj(self._attend(self.attn_qkv(x))), self.settings.attn_balance)
        bound = self.settings.clip_act
        return x if bound is None else x.clamp(-bound, bound)

    def _attend(self, qkv_NCHW: Tensor) -> Tensor:
        """Attention of queries, keys and values that are normalised for each pixel and head."""
        count, _, height, width = qkv_NCHW.shape
        qkv_NLh3D = qkv_NCHW.permute(0, 2, 3, 1).reshape(count, height * width, self.heads, 3, -1)
        q, k, v = (y.transpose(1, 2) for y in normal_magnitude(qkv_NLh3D, -1).unbind(3))
        return to_images(F.scaled_dot_product_attention(q, k, v), height)


class EDM2UNet(nn.Module):
    """The U-Net described at the top of this module. Its noise level is ln(sigma) / 4, (N,) float32.

    With `out_channels` its last layer has that many, each with a gain of its own, as filters of unit magnitude cannot vanish;
    otherwise as many as an image, with one gain for all of them.
    """

    def __init__(self, settings: EDM2Settings, out_channels: int | None = None) -> None:
        super().__init__()
        self.settings = settings
        widths = [settings.model_channels * multiplier for multiplier in settings.channel_mult]
        noise, embedding = settings.channel_mult_noise, settings.channel_mult_emb
        c_noise = settings.model_channels * noise if noise else widths[0]
        c_embedding = settings.model_channels * embedding if embedding else max(widths)
        self.out_gain = nn.Parameter(torch.zeros([out_channels, 1, 1] if out_channels else []))
        self.emb_fourier, self.emb_noise = MPFourier(c_noise), MPLayer(c_noise, c_embedding)
        self.emb_label = MPLayer(settings.label_dim, c_embedding) if settings.label_dim else None

        def block(name: str, c_in: int, c_out: int, resample: str = "") -> MPBlock:
            heads = settings.heads.get(name, 0)
            encoder = name.startswith("enc.")
            return MPBlock(
                c_in, c_out, c_embedding, settings, encoder=encoder, resample=resample, heads=heads
            )

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = list(enumerate(zip(settings.resolutions, widths, strict=True)))
        c, skips = settings.img_channels + 1, []
        for level, (size, width) in levels:
            at = f"{size}x{size}"
            if level == 0:
                self.enc[f"{at}_conv"], c = MPLayer(c, width, 3), width
            else:
                self.enc[f"{at}_down"] = block(f"enc.{at}_down", c, c, "down")
            skips.append(c)
            for i in range(settings.num_blocks):
                name = f"{at}_block{i}"
                self.enc[name], c = block(f"enc.{name}", c, width), width
                skips.append(c)
        for level, (size, width) in reversed(levels):
            at, lowest = f"{size}x{size}", level == len(levels) - 1
            blocks = decoder_blocks(at, c, width, settings.num_blocks + 1, skips, lowest)
            for name, c_in, c_out, resample in blocks:
                self.dec[name] = block(f"dec.{name}", c_in, c_out, resample)
            c = width
        self.out_conv = MPLayer(c, out_channels or settings.img_channels, 3)

    def embedding(self, noise_N: Tensor, labels_N: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embedding of noise levels and classes, (N, E), after its SiLU."""
        e = self.emb_noise(self.emb_fourier(noise_N).to(dtype))
        if self.emb_label is not None:
            classes = self.settings.label_dim
            label = self.emb_label(one_hot(labels_N, classes, e) * math.sqrt(classes))
            e = blend(e, label, self.settings.label_balance)
        return silu(e)

    def forward(self, x_NCHW: Tensor, noise_N: Tensor, labels_N: Tensor | None = None) -> Tensor:
        """Images (N, C, H, W), noise levels (N,) and classes (N,), `label_dim` for none -> (N, C_out, H, W)."""
        e = self.embedding(noise_N, labels_N, x_NCHW.dtype)
        x, skips = x_NCHW.contiguous(memory_format=torch.channels_last), []
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        for name, module in self.enc.items():
            x = module(x) if name.endswith("_conv") else module(x, e)
            skips.append(x)
        for name, module in self.dec.items():
            x = join(x, skips.pop(), self.settings.concat_balance) if "_block" in name else x
            x = module(x, e)
        output: Tensor = self.out_conv(x) * self.out_gain
        return output
