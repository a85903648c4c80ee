"""A CLIP that scores edits: any folder in transformers' layout, such as openai/clip-vit-base-patch32's, offline."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel

from forgedit.errors import ModelError
from forgedit.model.folder import read_json, read_tokenizer, read_weights
from forgedit.model.pickled import refuse_pickled_part

PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
BATCH = 32  # pictures or texts at once


class ClipScorer:
    """A quality.agreement.Scorer. Pictures are seen as the folder says: often their centre alone, as a square.

    name: the folder's, with eight digits of its weights' SHA-256, as thresholds belong to one set of weights
    clip: CLIPModel in float32, frozen; tokenizer, preprocess: what the folder brings with it
    """

    def __init__(self, name: str, clip: Any, tokenizer: Any, preprocess: Any) -> None:
        self.name = name
        self._clip, self._tokenizer, self._preprocess = clip, tokenizer, preprocess

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any sizes to unit rows, float32 [B, D] on the CPU."""
        rows = [torch.empty(0, self._clip.config.projection_dim)]
        for start in range(0, len(images), BATCH):
            inputs = self._preprocess(images=list(images[start : start + BATCH]), return_tensors="pt")
            seen = self._clip.vision_model(pixel_values=inputs.pixel_values.to(self._clip.device))
            rows.append(self._clip.visual_projection(seen.pooler_output).cpu())
        return torch.nn.functional.normalize(torch.cat(rows), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit rows, float32 [B, D] on the CPU; what is longer than the model takes is cut."""
        rows = [torch.empty(0, self._clip.config.projection_dim)]
        for start in range(0, len(texts), BATCH):
            words = list(texts[start : start + BATCH])
            inputs = self._tokenizer(words, padding=True, truncation=True, return_tensors="pt").to(self._clip.device)
            read = self._clip.text_model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
            rows.append(self._clip.text_projection(read.pooler_output).cpu())
        return torch.nn.functional.normalize(torch.cat(rows), dim=1)


def check_scorer(folder: Path) -> None:
    """What can be told of a scorer's folder without reading its weights. Raises: ModelError as load_scorer does."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ModelError(f"the scorer in {str(folder)!r} is of type {kind!r}; expected 'clip', a whole CLIPModel")
    if not any(folder.glob("*.safetensors")):
        refuse_pickled_part(folder, "CLIPModel")
    if not any((folder / name).is_file() for name in PREPROCESSING):  # transformers would take its defaults
        raise ModelError(f"the scorer in {str(folder)!r} has no {PREPROCESSING[0]}; expected how it sees a picture")


def load_scorer(folder: str | Path, device: torch.device | str = "cpu") -> ClipScorer:
    """Read config.json, *.safetensors, the tokenizer's files and preprocessor_config.json; nothing is downloaded.

    Raises: ModelError if one is missing, cut, pickled, of another kind of model, or does not fit the others
    """
    folder = Path(folder)
    check_scorer(folder)
    clip = read_weights(CLIPModel, folder, dtype=torch.float32).requires_grad_(False).eval()
    tokenizer = read_tokenizer(folder)
    try:
        preprocess = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        seen = preprocess(images=Image.new("RGB", (8, 16)), return_tensors="pt").pixel_values
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise ModelError(f"the scorer's preprocessing cannot be used: {str(error).splitlines()[0]}") from error
    _check_fit(folder, clip.config, tokenizer, seen)
    tokenizer.model_max_length = min(tokenizer.model_max_length, clip.config.text_config.max_position_embeddings)
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return ClipScorer(f"{folder.name}-{digest.hexdigest()[:8]}", clip.to(device), tokenizer, preprocess)


def _check_fit(folder: Path, config: Any, tokenizer: Any, seen: Tensor) -> None:
    side, known = config.vision_config.image_size, config.text_config.vocab_size
    if seen.shape[-2:] != (side, side):
        raise ModelError(
            f"the scorer in {str(folder)!r} prepares pictures of {seen.shape[-1]} by {seen.shape[-2]} pixels, its "
            f"model takes {side} by {side}; expected the {PREPROCESSING[0]} that came with the weights"
        )
    if len(tokenizer) > known:
        raise ModelError(
            f"the scorer's tokenizer has {len(tokenizer)} tokens, its text tower knows {known}; expected no more"
        )
