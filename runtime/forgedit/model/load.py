"""Load a model: the bundled one, or a folder in diffusers' layout. Local files and safetensors only, float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from forgedit.config import Defaults
from forgedit.errors import ModelError

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True, eq=False)
class Model:
    """The parts of one text-to-image model, frozen, in eval mode, contiguous, on one device.

    captioner, processor: None where the folder has no captioner/
    alphas_cumprod: [train steps] float32; resolution: pixels, the side of the model's own square picture
    vae_scale: pixels a latent; defaults: settings the folder recommends
    """

    name: str
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    captioner: Any
    processor: Any
    alphas_cumprod: Tensor
    resolution: int
    vae_scale: int
    defaults: Defaults


def load_model(name: str | Path, device: str = "cpu") -> Model:
    """Load every part.

    name: 'bundled', or a folder with unet/ vae/ text_encoder/ tokenizer/ scheduler/, and optionally captioner/ (BLIP)
        and forgedit.json: {"resolution": pixels, "tune": {…}, "edit": {…}, "sweep": {…}}
    Raises: ModelError if a part is missing, pickled, incomplete or not supported
    """
    folder = BUNDLED if name == "bundled" else Path(name)
    if not folder.is_dir():
        raise ModelError(f"no model folder {str(folder)!r}; expected 'bundled' or a folder in diffusers' layout")
    unet = _weights(UNet2DConditionModel, folder / "unet", device, torch_dtype=torch.float32)
    vae = _weights(AutoencoderKL, folder / "vae", device, torch_dtype=torch.float32)
    text_encoder = _weights(CLIPTextModel, folder / "text_encoder", device, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(_part(folder / "tokenizer"), local_files_only=True)
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    captioner = processor = None
    if (folder / "captioner").is_dir():
        captioner = _weights(BlipForConditionalGeneration, folder / "captioner", device, dtype=torch.float32)
        processor = BlipProcessor.from_pretrained(folder / "captioner", local_files_only=True)
    vae_scale = 2 ** (len(vae.config.block_out_channels) - 1)
    resolution, defaults = _recommended(folder / "forgedit.json", unet.config.sample_size * vae_scale)
    return Model(
        name=str(name),
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        captioner=captioner,
        processor=processor,
        alphas_cumprod=_alphas_cumprod(folder / "scheduler").to(device),
        resolution=resolution,
        vae_scale=vae_scale,
        defaults=defaults,
    )


def _part(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelError(
            f"the model folder has no {folder.name}/; expected diffusers' layout at {str(folder.parent)!r}"
        )
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars from transformers: a library prints nothing. Its setting is put back."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _weights(kind: Any, folder: Path, device: str, **dtype: torch.dtype) -> Any:
    """One module: frozen, eval, and contiguous, as torch's CPU backward crashes on channels-last with frozen blocks."""
    if not any(_part(folder).glob("*.safetensors")):
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".ckpt", ".pt")]
        found = f"only pickled weights ({', '.join(pickled)}), which are refused" if pickled else "no weights"
        raise ModelError(f"{folder.name}/ holds {found}; convert with save_pretrained(…, safe_serialization=True)")
    with _quiet():
        module, report = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **dtype
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{folder.name}/ lacks {len(missing)} weights of its configuration, such as {missing[0]!r}")
    return module.requires_grad_(False).eval().to(device=device, memory_format=torch.contiguous_format)


def _alphas_cumprod(folder: Path) -> Tensor:
    """From the scheduler's own configuration; loaded directly, as StableDiffusionPipeline rewrites steps_offset."""
    scheduler = DDIMScheduler.from_pretrained(_part(folder), local_files_only=True)
    if scheduler.config.prediction_type != "epsilon":
        raise ModelError(f"prediction_type {scheduler.config.prediction_type!r} is not supported; expected 'epsilon'")
    alphas_cumprod: Tensor = scheduler.alphas_cumprod
    return alphas_cumprod


def _recommended(path: Path, resolution: int) -> tuple[int, Defaults]:
    """The folder's own resolution in pixels and settings; `resolution` and METHOD's where it says nothing."""
    try:
        recommended: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return int(recommended.pop("resolution", resolution)), Defaults.merged(recommended)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path.name} holds settings that are not known: {error}") from error
