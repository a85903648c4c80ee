"""The bundled model's UNet and text encoder, trained together on cached latents.

Epsilon prediction on SD's schedule; one caption in ten is empty, for guidance. The loss is weighted three times:
- a timestep by min(SNR, 5) / SNR (Hang et al. 2023, arXiv 2303.09556), and by 1 + sigma / 2 with sigma = SNR^-1/2: what
  a sampler adds up is the error of epsilon times the step of sigma, and most of sigma's way is at high noise, where
  object and colour are decided and plain epsilon errors are tiny;
- a place by 1 + 3 * object coverage, as the object is what captions are about;
- a scene by being drawn POSED_ODDS times as often if its object has a pose, the hardest attribute to learn.
"""

from __future__ import annotations

from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bench.world import pool, text
from bench.world.loop import Loss, Plan
from bench.world.vae import SCALING_FACTOR, encode_chunk
from forgedit.world.scene import OBJECTS, POSES, captions

SNR_LIMIT = 5.0
DROPOUT = 0.1
OBJECT_WEIGHT = 3.0
POSED_ODDS = 1.6
TIMESTEPS = 1000


def build_unet() -> UNet2DConditionModel:
    """SD's block types, four down and four up, heads of 32 channels throughout."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 128, 160),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(2, 3, 4, 5),
        norm_num_groups=16,
    )


def alphas_cumprod() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


class TextToLatents(nn.Module):
    """What is trained: UNet and text encoder in one module, so that one checkpoint holds both."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(noisy, t, self.text_encoder(ids).last_hidden_state).sample


def cache_latents(weights: Path, data: Path, out: Path, device: str = "cpu", workers: int = 1) -> None:
    """Encode the pool with the finished autoencoder; keep what training needs in one file."""
    encode = partial(encode_chunk, weights=weights, device=device)
    with get_context("spawn").Pool(workers) as processes:
        parts = processes.map(encode, pool.files(data), chunksize=1)
    mean, std = (torch.cat(column) for column in zip(*parts, strict=True))
    rendered = pool.load(data)
    tokenizer = text.write_tokenizer(out.parent / "tokenizer")
    ids = torch.stack([text.tokens_of(tokenizer, captions(rendered.scenes, prefix)) for prefix in text.PREFIXES], 1)
    empty = text.tokens_of(tokenizer, [""])[0]
    coverage = F.adaptive_avg_pool2d(rendered.mask.half() / 255, mean.shape[-2:])
    posed = torch.tensor([name in POSES for name in OBJECTS])[rendered.scenes.object]
    fields = {"mean": mean, "std": std, "coverage": coverage, "posed": posed, "ids": ids.short(), "empty": empty}
    torch.save(fields, out)


def _loss(
    module: TextToLatents, data: dict[str, Tensor], acp: Tensor, device: str, n: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    odds = torch.where(data["posed"], POSED_ODDS, 1.0)
    index = torch.multinomial(odds, n, replacement=True, generator=generator)
    mean, std = data["mean"][index].float(), data["std"][index].float()
    latents = (mean + std * torch.randn(mean.shape, generator=generator)) * SCALING_FACTOR
    variant = (torch.rand(n, generator=generator) < 0.3).long()
    ids = data["ids"][index, variant].long()
    ids[torch.rand(n, generator=generator) < DROPOUT] = data["empty"]
    noise = torch.randn(mean.shape, generator=generator)
    t = torch.randint(0, TIMESTEPS, (n,), generator=generator)
    signal = acp[t].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    place = 1 + OBJECT_WEIGHT * data["coverage"][index].float()
    noisy, noise, t, ids, place = (v.to(device) for v in (noisy, noise, t, ids, place))
    squared = (module(noisy, t, ids) - noise).pow(2)
    snr = (acp / (1 - acp)).to(device)[t]
    weight = snr.clamp(max=SNR_LIMIT) / snr * (1 + 0.5 / snr.sqrt())
    return (weight * (place * squared).mean((1, 2, 3))).mean(), {"mse": squared.mean().item()}


def build(plan: Plan, latents: Path) -> tuple[nn.Module, Loss]:
    tokenizer = text.CLIPTokenizer.from_pretrained(latents.parent / "tokenizer")
    module = TextToLatents(build_unet(), text.build_text_encoder(tokenizer))
    data = torch.load(latents, weights_only=True, mmap=True)
    return module, partial(_loss, module, data, alphas_cumprod(), plan.device)
