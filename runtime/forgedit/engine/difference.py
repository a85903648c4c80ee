"""Where two prompts see different noise in one photo: one half of a change mask (quality/change_mask.py)."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from forgedit.config import EditConfig
from forgedit.engine.batch import unet_weights
from forgedit.engine.reference import Reference
from forgedit.engine.resident import Resident
from forgedit.model import Model
from forgedit.session import Session
from forgedit.stages.encode import Prompt, encode_image

# Of the training steps. At less noise the answers differ in texture, also where nothing is to change (docs/log.md)
NOISE_LEVELS = (0.55, 0.75, 0.95)


def noise_difference(
    path: Reference | Resident, model: Model, session: Session, prompt: Prompt, config: EditConfig
) -> Tensor:
    """How far apart the noise predicted under the source and under the edit embedding is in the photo, and where.

    prompt: the target; config: the edit's, whose weights are loaded, and whose seed the noise has
    The photo is noised to each of NOISE_LEVELS, and the UNet asked for two rows at a time, as by one guided step.
    Returns: [h, w] float32 on the CPU: the norm over channels, at each level divided by its mean, averaged over levels
    Source: Couairon et al. 2022, arXiv 2210.11427, section 3.2: there the weights are the model's own, and ten draws of
        noise have one level
    """
    alphas, generator = model.alphas_cumprod, torch.Generator().manual_seed(config.seed)
    drawn = torch.Generator().manual_seed(session.config.seed)  # the photo's latents are those that were learned
    latents = encode_image(session.source, model.vae, drawn).latents
    prompts = torch.cat([session.embedding, path.blend(session.embedding, prompt.embedding, [config])])
    path.load(weakref.ref(session), unet_weights(session), config.strategy, config.keep)
    maps = []
    for level in NOISE_LEVELS:
        timestep = torch.tensor([round(level * len(alphas))], device=latents.device)
        alpha_cumprod = alphas[timestep].view(1, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = alpha_cumprod**0.5 * latents + (1 - alpha_cumprod) ** 0.5 * noise
        under_source, under_edit = path.predict(noisy, timestep, prompts)
        difference = (under_edit - under_source)[0].norm(dim=0)
        maps.append(difference / difference.mean().clamp_min(1e-12))
    return torch.stack(maps).mean(dim=0).cpu()
