"""The source prompt: the captioner's words for the photo (METHOD item 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

PREFIX = "A photo of "
NEW_TOKENS = 20  # transformers' own default


@torch.no_grad()
def caption_photo(photo: Image.Image, captioner: Any, processor: Callable[..., Any], target: str = "") -> str:
    """Caption a photo.

    photo: RGB, before any resizing
    captioner, processor: BlipForConditionalGeneration and its processor; default `generate`
    target: if it contains 'A photo of ', the caption gets that prefix, unless it begins so by itself
    """
    inputs = processor(images=photo, return_tensors="pt").to(captioner.device)
    ids = captioner.generate(**inputs, **_length(captioner.text_decoder))[0]
    words: str = processor.decode(ids, skip_special_tokens=True).strip()  # type: ignore[attr-defined]
    wanted = PREFIX in target and not words.lower().startswith(PREFIX.lower())
    return PREFIX + words if wanted else words


def _length(decoder: Any) -> dict[str, int]:
    """The length `generate` takes by default, said aloud: where nobody says it, transformers warns at each call."""
    chosen = decoder.generation_config
    if chosen.max_length is not None or chosen.max_new_tokens is not None:
        return {}
    return {"max_new_tokens": min(NEW_TOKENS, decoder.config.max_position_embeddings - 1)}  # the start token is one
