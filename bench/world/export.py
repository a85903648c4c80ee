"""Write the trained parts as a model folder in diffusers' layout, float16 safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from bench.world import text
from bench.world.captioner import load_captioner
from bench.world.diffusion import TextToLatents, build_unet
from bench.world.vae import build_vae

BUNDLED = Path(__file__).parents[2] / "runtime" / "forgedit" / "model" / "bundled"


def restore(out: Path, folder: Path) -> None:
    """The way back: vae_final.pt, diffusion_init.pt and captioner_init.pt in the training folder, from a model folder.

    Training then goes on from published weights: `train latents`, `train diffusion --init …/diffusion_init.pt`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32)
    torch.save(vae.state_dict(), folder / "vae_final.pt")
    unet = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)
    joint = TextToLatents(unet, CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32))
    torch.save({"ema": joint.state_dict()}, folder / "diffusion_init.pt")
    torch.save({"ema": load_captioner(out / "captioner")[0].state_dict()}, folder / "captioner_init.pt")


def _averaged(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)["ema"]
    return state


def export(folder: Path, out: Path) -> None:
    """Gather what training left into the model folder `out`; its settings, card and demo picture stay as they are.

    folder: the training folder (vae_final.pt, diffusion.pt; captioner/ and clip/ if trained)
    """
    tokenizer = text.write_tokenizer(out / "tokenizer")
    vae = build_vae()
    vae.load_state_dict(torch.load(folder / "vae_final.pt", weights_only=True))
    joint = TextToLatents(build_unet(), text.build_text_encoder(tokenizer))
    joint.load_state_dict(_averaged(folder / "diffusion.pt"))
    parts: dict[str, Any] = {"vae": vae, "unet": joint.unet, "text_encoder": joint.text_encoder}
    for name, module in parts.items():
        module.half().save_pretrained(out / name, safe_serialization=True)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=0,
    )
    scheduler.save_pretrained(out / "scheduler")
    for trained, name in (("captioner", "captioner"), ("clip", "scorer")):
        if (folder / trained / "model").is_dir():
            shutil.copytree(folder / trained / "model", out / name, dirs_exist_ok=True)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
