"""Load a model: the bundled one, a folder in diffusers' layout, a hub id, or a single checkpoint file; float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from forgedit.config import Defaults
from forgedit.errors import ModelError
from forgedit.model.folder import (
    checked_prediction_type,
    has_tokenizer,
    noise_schedule,
    part,
    read_captioner,
    read_json,
    read_recommended,
    read_tokenizer,
    read_weights,
)
from forgedit.model.hub import fetch, is_hub_id
from forgedit.model.pickled import refuse_pickled_file
from forgedit.model.scorer import PREPROCESSING, ClipScorer, check_scorer, load_scorer
from forgedit.model.single_file import CLIP_TOKENIZER, SCHEDULE, read_checkpoint

BUNDLED = Path(__file__).parent / "bundled"
WEIGHTED = ("unet", "vae", "text_encoder")
PARTS = (*WEIGHTED, "tokenizer", "scheduler")
MODEL_FILES = ("model_index.json", "forgedit.json", "captioner/*", "scorer/*", *(f"{name}/*" for name in PARTS))
TOKENIZER_FILES = ("*vocab.json", "*merges.txt", "*tokenizer*.json", "*special_tokens_map.json")
CAPTIONER_FILES = ("*.json", "*.txt", "*.safetensors")
SCORER_FILES = (*PREPROCESSING, "config.json", *TOKENIZER_FILES, "*.safetensors")


@dataclass(frozen=True, eq=False)
class Model:
    """The parts of one text-to-image model, frozen, in eval mode, contiguous, on one device.

    captioner, processor: None where there is no captioner
    alphas_cumprod: [train steps] float32; resolution: pixels, the side of the model's own square picture
    vae_scale: pixels a latent; defaults: settings the folder recommends
    prediction_type: what the UNet answers, 'epsilon' (the noise) or 'v_prediction' (the velocity)
    scorer_folder: where its scorer is read from when first asked for; None where there is none
    """

    name: str
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    captioner: Any
    processor: Any
    alphas_cumprod: Tensor
    prediction_type: str
    resolution: int
    vae_scale: int
    defaults: Defaults
    scorer_folder: Path | None = None

    @cached_property
    def scorer(self) -> ClipScorer | None:
        """The CLIP that scores edits, on the model's device. Raises: ModelError if it cannot be read."""
        return None if self.scorer_folder is None else load_scorer(self.scorer_folder, self.alphas_cumprod.device)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture, sides in pixels. Raises: ValueError for a size it cannot edit."""
        unit = 4 * self.vae_scale
        if width < unit or height < unit or width % unit or height % unit:
            raise ValueError(f"size {width} by {height} cannot be edited; expected multiples of {unit} pixels")
        return self.unet.config.in_channels, height // self.vae_scale, width // self.vae_scale

    def describe(self) -> dict[str, Any]:
        """What it is, for JSON: its resolution in pixels, its device, the parameters of its parts."""
        counts = {
            f"{part}_parameters": sum(weight.numel() for weight in getattr(self, part).parameters())
            for part in ("unet", "text_encoder", "vae")
        }
        return {
            "model": self.name,
            "resolution": self.resolution,
            "prediction_type": self.prediction_type,
            "device": str(self.alphas_cumprod.device),
            **counts,
            "captioner": self.captioner is not None,
            "scorer": self.scorer_folder is not None,
        }


def load_model(
    name: str | Path,
    device: str = "cpu",
    captioner: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    scorer: str | Path | None = None,
) -> Model:
    """Load every part but the scorer, which is read when first asked for.

    name: 'bundled'; or a folder with unet/ vae/ text_encoder/ tokenizer/ scheduler/, and optionally captioner/ (BLIP),
        scorer/ (CLIP) and forgedit.json: {"resolution": pixels, "tune": {…}, "edit": {…}, "sweep": {…}}; or a hub id
        'owner/name' of the same layout; or a file *.safetensors with Stable Diffusion 1.x or 2.x in its original names
    captioner: a folder or hub id with BLIP; None takes the model folder's captioner/, if it has one
    tokenizer: a folder or hub id with CLIP's tokenizer, or with it in tokenizer/; None takes the model folder's, for a
        single file the hub's openai/clip-vit-large-patch14
    prediction_type: 'epsilon' or 'v_prediction'; None takes what the model says
    scorer: a folder or hub id with CLIP; None takes the model folder's scorer/, if it has one
    Raises: ModelError if a part is missing, pickled, incomplete or not supported, or the hub is needed and out of reach
    """
    if prediction_type is not None:
        checked_prediction_type(prediction_type)
    place = BUNDLED if name == "bundled" else find_model(name)
    read = _read_folder if place.is_dir() else _read_file
    model = read(str(name), place, tokenizer, prediction_type)
    captions = find_captioner(captioner) if captioner else place / "captioner"
    if captions.is_dir():
        module, processor = read_captioner(captions)
        model = replace(model, captioner=module, processor=processor)
    scores = find_scorer(scorer) if scorer else place / "scorer"
    if scores.is_dir():
        check_scorer(scores)
        model = replace(model, scorer_folder=scores)
    check_parts(model)
    model.tokenizer.model_max_length = min(
        model.tokenizer.model_max_length, model.text_encoder.config.max_position_embeddings
    )
    return replace(
        model,
        unet=_frozen(model.unet, device),
        vae=_frozen(model.vae, device),
        text_encoder=_frozen(model.text_encoder, device),
        captioner=None if model.captioner is None else _frozen(model.captioner, device),
        alphas_cumprod=model.alphas_cumprod.to(device),
    )


def find_model(name: str | Path) -> Path:
    """The folder or file of a model by its path or hub id. Raises: ModelError."""
    path = Path(name)
    if not path.is_file():
        return _find(name, "model", MODEL_FILES, _is_model)
    refuse_pickled_file(path)
    if path.suffix.lower() != ".safetensors":
        raise ModelError(f"{str(name)!r} is no model; expected a folder, or a file named *.safetensors")
    return path


def find_tokenizer(name: str | Path) -> Path:
    """The folder with CLIP's tokenizer, by path or hub id; it may lie in tokenizer/. Raises: ModelError."""
    return _words(_find(name, "tokenizer", TOKENIZER_FILES, lambda folder: has_tokenizer(_words(folder))))


def find_captioner(name: str | Path) -> Path:
    """The folder with BLIP, by its path or hub id. Raises: ModelError."""
    return _find(name, "captioner", CAPTIONER_FILES, _has_weights)


def find_scorer(name: str | Path) -> Path:
    """The folder with CLIP, by its path or hub id. Raises: ModelError."""
    return _find(name, "scorer", SCORER_FILES, _has_weights)


def _find(name: str | Path, what: str, wanted: tuple[str, ...], is_whole: Callable[[Path], bool]) -> Path:
    path = Path(name)
    if path.is_dir():
        return path
    refuse_pickled_file(path)
    if path.exists():
        raise ModelError(f"the {what} {str(name)!r} is a file; expected a folder, or a hub id owner/name")
    if is_hub_id(name):
        return fetch(str(name), wanted, is_whole)
    also = "'bundled', " if what == "model" else ""
    raise ModelError(f"no {what} folder {str(name)!r}; expected {also}a folder, or a hub id owner/name")


def _words(folder: Path) -> Path:
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _is_model(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in PARTS) and all(_has_weights(folder / name) for name in WEIGHTED)


def _read_folder(name: str, folder: Path, tokenizer: str | Path | None, prediction_type: str | None) -> Model:
    unet = read_weights(UNet2DConditionModel, part(folder, "unet"), torch_dtype=torch.float32)
    vae = read_weights(AutoencoderKL, part(folder, "vae"), torch_dtype=torch.float32)
    text_encoder = read_weights(CLIPTextModel, part(folder, "text_encoder"), dtype=torch.float32)
    words = read_tokenizer(find_tokenizer(tokenizer) if tokenizer else part(folder, "tokenizer"))
    alphas_cumprod, declared = noise_schedule(read_json(part(folder, "scheduler") / "scheduler_config.json"))
    scale = vae_scale(vae)
    resolution, defaults = read_recommended(folder / "forgedit.json", unet.config.sample_size * scale)
    return Model(
        name=name,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=words,
        captioner=None,
        processor=None,
        alphas_cumprod=alphas_cumprod,
        prediction_type=prediction_type or declared,
        resolution=resolution,
        vae_scale=scale,
        defaults=defaults,
    )


def _read_file(name: str, path: Path, tokenizer: str | Path | None, prediction_type: str | None) -> Model:
    words = read_tokenizer(find_tokenizer(tokenizer) if tokenizer else _clip_tokenizer(path))
    checkpoint = read_checkpoint(path, prediction_type)
    words.pad_token = words.eos_token if checkpoint.pads_with_end else words.convert_ids_to_tokens(0)
    alphas_cumprod, _ = noise_schedule(SCHEDULE)
    return Model(
        name=name,
        unet=checkpoint.unet,
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=words,
        captioner=None,
        processor=None,
        alphas_cumprod=alphas_cumprod,
        prediction_type=checkpoint.prediction_type,
        resolution=checkpoint.resolution,
        vae_scale=vae_scale(checkpoint.vae),
        defaults=Defaults.merged({}),
    )


def _clip_tokenizer(path: Path) -> Path:
    try:
        return find_tokenizer(CLIP_TOKENIZER)
    except ModelError as error:
        raise ModelError(
            f"{path.name} is one file, without a tokenizer, and CLIP's is not at hand; give tokenizer: a folder with "
            "its vocab.json and merges.txt, such as tokenizer/ of any Stable Diffusion folder, or DIR after "
            f"`hf download {CLIP_TOKENIZER} vocab.json merges.txt --local-dir DIR` where there is a network"
        ) from error


def vae_scale(vae: Any) -> int:
    """Pixels a latent."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def check_parts(model: Model) -> None:
    """That the parts fit each other, and are a text-to-image model of Stable Diffusion's kind. Raises: ModelError."""
    unet, latents, width = model.unet.config, model.vae.config.latent_channels, model.text_encoder.config.hidden_size
    if not unet.in_channels == unet.out_channels == latents:
        raise ModelError(
            f"the UNet takes {unet.in_channels} channels and gives {unet.out_channels}, the VAE's latents have "
            f"{latents}; expected all equal: inpainting, depth and upscaling models are not supported"
        )
    if unet.cross_attention_dim != width:
        raise ModelError(
            f"the UNet attends to embeddings of width {unet.cross_attention_dim}, the text encoder gives {width}; "
            "expected one width: the parts belong to different models, or to one with several text encoders"
        )
    conditions = {name: unet[name] for name in ("class_embed_type", "addition_embed_type", "num_class_embeds")}
    if any(value is not None for value in conditions.values()):
        raise ModelError(f"the UNet wants more than a prompt: {conditions}; expected Stable Diffusion 1.x or 2.x")
    tokens, known = len(model.tokenizer), model.text_encoder.config.vocab_size
    if tokens > known:
        raise ModelError(
            f"the tokenizer has {tokens} tokens, the text encoder knows {known}; expected no more than those"
        )


def _frozen(module: Any, device: str) -> Any:
    """Frozen, in eval mode, and contiguous: torch's CPU backward crashes on channels-last with frozen blocks."""
    return module.requires_grad_(False).eval().to(device=device, memory_format=torch.contiguous_format)
