"""Stable Diffusion 1.4's exact shapes with random weights, built on the device; nothing is downloaded.

Speed depends on shapes, not on values. Tokenizer, image normalisation and noise schedule are the bundled model's: they
are either equal to Stable Diffusion's (the schedule) or cost next to nothing (the words).
Source: the config.json files of CompVis/stable-diffusion-v1-4 and Salesforce/blip-image-captioning-base
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import BlipConfig, BlipForConditionalGeneration, CLIPTextConfig, CLIPTextModel

from forgedit.config import Defaults
from forgedit.model import Model, load_model
from forgedit.model.load import BUNDLED

UNET = dict(
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    attention_head_dim=8,
    cross_attention_dim=768,
    norm_num_groups=32,
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)
VAE = dict(
    sample_size=512,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=32,
    scaling_factor=0.18215,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
TEXT = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
)
_BASE = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
CAPTIONER = dict(
    text_config=_BASE | dict(vocab_size=30524, encoder_hidden_size=768, max_position_embeddings=512),
    vision_config=_BASE | dict(image_size=384, patch_size=16),
)
RESOLUTION = 512  # pixels


def sd14_model(device: str) -> Model:
    """All parts on the device, random but the same each time; METHOD's own settings. device: a torch device string"""
    bundled = load_model("bundled", device)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        parts = dict(
            unet=UNet2DConditionModel(**UNET),
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
            captioner=BlipForConditionalGeneration(BlipConfig(**CAPTIONER)),
        )
    side = CAPTIONER["vision_config"]["image_size"]
    bundled.processor.image_processor.size = {"height": side, "width": side}
    return dataclasses.replace(
        bundled,
        name="sd14, random weights",
        **{name: part.requires_grad_(False).eval() for name, part in parts.items()},
        resolution=RESOLUTION,
        vae_scale=8,
        defaults=Defaults.merged({}),
    )


def save_model(model: Model, folder: Path) -> None:
    """Write a model of sd14_model as a folder that an editor can load; it has no captioner."""
    for name in ("unet", "vae", "text_encoder"):
        getattr(model, name).save_pretrained(folder / name)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(BUNDLED / name, folder / name)
    (folder / "forgedit.json").write_text(json.dumps({"resolution": model.resolution}))
