"""Photo to latents, prompt to embedding (METHOD items 1, 3, 4)."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from forgedit.config import TuneConfig
from forgedit.errors import InputError


@dataclass(frozen=True)
class Encoded:
    """image: RGB at the edited size; latents: [1, C, h, w], drawn from the posterior and scaled."""

    image: Image.Image
    latents: Tensor


@dataclass(frozen=True)
class Prompt:
    """embedding: [1, T, D]; cut: the words beyond the model's tokens, which it does not see; '' if none."""

    embedding: Tensor
    cut: str


def resize_photo(photo: Image.Image, config: TuneConfig, resolution: int, vae_scale: int) -> Image.Image:
    """Bring a photo to a size the model takes.

    'fit' keeps the aspect ratio: the photo is scaled to the area width * height, each side rounded to a multiple.
    'squash' is upstream's: width by height with PIL's default filter, then floored to multiples with Lanczos.
    config.width, height: pixels, None for `resolution`
    vae_scale: pixels a latent; sides are multiples of 4 latents (32 pixels for Stable Diffusion)
    """
    multiple = 4 * vae_scale
    width, height = config.width or resolution, config.height or resolution
    if config.resize == "squash":
        photo = photo.resize((width, height))
        size = (max(width // multiple, 1) * multiple, max(height // multiple, 1) * multiple)
    else:
        scale = math.sqrt(width * height / (photo.width * photo.height)) / multiple
        size = (max(round(photo.width * scale), 1) * multiple, max(round(photo.height * scale), 1) * multiple)
    return photo.resize(size, Image.Resampling.LANCZOS)


@torch.no_grad()
def encode_image(image: Image.Image, vae: Any, generator: torch.Generator) -> Encoded:
    """Encode an RGB image whose sides the VAE divides; one posterior draw from the CPU generator."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    # contiguous: torch 2.13 crashes on the CPU in the backward pass of a channels-last UNet with frozen blocks
    pixels = (torch.from_numpy(array).permute(2, 0, 1)[None] / 255 * 2 - 1).contiguous()
    latents = vae.encode(pixels.to(vae.device)).latent_dist.sample(generator) * vae.config.scaling_factor
    return Encoded(image, latents.contiguous())


def check_prompt(prompt: str, name: str) -> None:
    """Refuse what no prompt should hold: control characters, line breaks and tabs among them, and lone surrogates.

    name: what the message calls the prompt
    Raises: InputError
    """
    for place, character in enumerate(prompt):
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise InputError(f"the {name} has the control character {character!r} at place {place}; leave it out")


def check_target(target: str) -> None:
    """Raises: InputError for a target prompt that is empty, or that check_prompt refuses."""
    if not target.strip():
        raise InputError("the target prompt is empty; say what the edited photo should show")
    check_prompt(target, "target prompt")


def tokenize(prompt: str, tokenizer: Any) -> tuple[Tensor, str]:
    """Token ids [1, T], padded and cut to the model's length, and the words that were cut ('' if none)."""
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    whole = tokenizer(prompt, truncation=False, verbose=False).input_ids  # transformers would print that it is long
    return ids, tokenizer.decode(whole[length - 1 : -1]) if len(whole) > length else ""


@torch.no_grad()
def encode_prompt(ids: Tensor, text_encoder: Any) -> Tensor:
    """Last hidden state [1, T, D] of token ids [1, T]."""
    embedding: Tensor = text_encoder(ids.to(text_encoder.device)).last_hidden_state
    return embedding
