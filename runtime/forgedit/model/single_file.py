"""One safetensors file with Stable Diffusion 1.x or 2.x in the original (CompVis) names; no network, no YAML.

The file holds weights alone. The configurations are those the models were published with, written here; the tokenizer
comes from elsewhere; and 2.x files do not say what they predict, unless their metadata follows Stability's ModelSpec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from forgedit.errors import ModelError
from forgedit.model.folder import checked_prediction_type

UNET, EMA, VAE = "model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # the one both generations use


@dataclass(frozen=True)
class Architecture:
    """What the file does not say. unet, vae, text_encoder: configurations; text_prefix: of the text encoder's names.

    pads_with_end: a prompt is filled up with end tokens, else with token 0; tokenizers' folders differ in it
    prediction_type: None where files of one architecture differ
    resolutions: pixels of the pictures it was trained on, by prediction type
    """

    name: str
    text_prefix: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    pads_with_end: bool
    prediction_type: str | None
    resolutions: Mapping[str, int]


_UNET = dict(
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
)
_VAE = dict(
    sample_size=512,
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    scaling_factor=0.18215,
)
ARCHITECTURES = (
    Architecture(
        name="Stable Diffusion 1.x",
        text_prefix=CLIP,
        unet=_UNET | dict(cross_attention_dim=768, attention_head_dim=8),
        vae=_VAE,
        text_encoder=dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            hidden_act="quick_gelu",
            projection_dim=768,
        ),
        pads_with_end=True,
        prediction_type="epsilon",
        resolutions={"epsilon": 512, "v_prediction": 512},
    ),
    Architecture(
        name="Stable Diffusion 2.x",
        text_prefix=OPEN_CLIP,
        # attention_head_dim is diffusers' word for the number of heads: 64 channels each
        unet=_UNET | dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
        vae=_VAE,
        text_encoder=dict(  # the last of ViT-H's 24 layers is not used
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
            projection_dim=512,
        ),
        pads_with_end=False,
        prediction_type=None,
        resolutions={"epsilon": 512, "v_prediction": 768},
    ),
)
SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What one file gives; see Architecture. The modules are float32, on the CPU; resolution: pixels."""

    unet: Any
    vae: Any
    text_encoder: Any
    pads_with_end: bool
    prediction_type: str
    resolution: int


def read_checkpoint(path: Path, prediction_type: str | None = None) -> Checkpoint:
    """Read and convert a file.

    prediction_type: 'epsilon' or 'v_prediction'; None takes what the file or its architecture says
    Raises: ModelError for a damaged file, one that is not a whole Stable Diffusion 1.x or 2.x, and a 2.x
        that does not say what it predicts
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            architecture = recognise(names, path)
            declared = prediction_type or _declared(file.metadata() or {}) or architecture.prediction_type
            if declared is None:
                raise ModelError(
                    f"{path.name} is a {architecture.name} and does not say what it predicts; give prediction_type: "
                    "'v_prediction' for 2.0 and 2.1 (768 pixels), 'epsilon' for their base models (512 pixels)"
                )
            prediction_type = checked_prediction_type(declared)
            modules = convert(architecture, names, lambda name: file.get_tensor(name).to(torch.float32, copy=True))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{str(path)!r} cannot be read as safetensors: {error}") from error
    return Checkpoint(*modules, architecture.pads_with_end, prediction_type, architecture.resolutions[prediction_type])


def recognise(names: set[str], path: Path) -> Architecture:
    """The architecture whose names a file has. Raises: ModelError for anything but a whole 1.x or 2.x."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has("conditioner."):
        raise ModelError(f"{path.name} is a Stable Diffusion XL; expected 1.x or 2.x")
    architecture = next((known for known in ARCHITECTURES if has(known.text_prefix)), None)
    missing = [prefix for prefix in (UNET, VAE) if not has(prefix)]
    if architecture is None or missing:
        wanted = ", ".join(f"{prefix}*" for prefix in missing) or f"{CLIP}* or {OPEN_CLIP}*"
        raise ModelError(
            f"{path.name} is not a whole Stable Diffusion checkpoint in the original names: it has no {wanted} "
            f"(first of {len(names)}: {min(names, default=None)!r}); a LoRA, an embedding or a single part will not do"
        )
    return architecture


def convert(architecture: Architecture, names: set[str], tensor: Callable[[str], Tensor]) -> tuple[Any, Any, Any]:
    """UNet, VAE and text encoder with a checkpoint's weights. tensor: the checkpoint's tensor of a name."""
    unet_weights = {name: tensor(_averaged(name, names)) for name in names if name.startswith(UNET)}
    unet = _filled(
        UNet2DConditionModel, architecture.unet, convert_ldm_unet_checkpoint(unet_weights, dict(architecture.unet))
    )
    vae_weights = {name: tensor(name) for name in names if name.startswith(VAE)}
    vae = _filled(AutoencoderKL, architecture.vae, convert_ldm_vae_checkpoint(vae_weights, dict(architecture.vae)))
    text_weights = {name: tensor(name) for name in names if name.startswith(architecture.text_prefix)}
    config = CLIPTextConfig(**architecture.text_encoder)
    if architecture.text_prefix == CLIP:
        text_weights = convert_ldm_clip_checkpoint(text_weights)
    else:
        text_weights = convert_open_clip_checkpoint(config, text_weights, prefix=OPEN_CLIP)
    return unet, vae, _filled(CLIPTextModel, config, text_weights)


def _averaged(name: str, names: set[str]) -> str:
    """The name of a UNet weight's moving average, where a file has both: the published folders hold the averages."""
    average = EMA + name.removeprefix(UNET).replace(".", "")
    return average if average in names else name


def _filled(kind: Any, config: Any, weights: Mapping[str, Tensor]) -> Any:
    """A module of a configuration with these weights. Raises: ModelError if one is missing or of another shape."""
    with init_empty_weights(include_buffers=False):
        module = kind(config) if isinstance(config, CLIPTextConfig) else kind(**config)
    weights = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    expected = {name: weight.shape for name, weight in module.state_dict().items()}
    for name, shape in expected.items():
        found = weights[name].shape if name in weights else None
        if found != shape:
            got = "is missing" if found is None else f"has shape {tuple(found)}"
            raise ModelError(
                f"{kind.__name__}'s weight {name!r} {got}; expected {tuple(shape)}, as text-to-image 1.x and 2.x have"
            )
    module.load_state_dict({name: weights[name] for name in expected}, assign=True)
    return module


def _declared(metadata: Mapping[str, str]) -> str | None:
    """The prediction type of ModelSpec's metadata, None where it has none."""
    words = {"v": "v_prediction", "epsilon": "epsilon"}
    return words.get(metadata.get("modelspec.prediction_type", ""))
