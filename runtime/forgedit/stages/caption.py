"""The source prompt: the captioner's words for the photo (METHOD item 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

PREFIX = "A photo of "


@torch.no_grad()
def caption_photo(photo: Image.Image, captioner: Any, processor: Callable[..., Any], target: str = "") -> str:
    """Caption a photo.

    photo: RGB, before any resizing
    captioner, processor: BlipForConditionalGeneration and its processor; default `generate`
    target: if it contains 'A photo of ', the caption gets that prefix, unless it begins so by itself
    """
    inputs = processor(images=photo, return_tensors="pt").to(captioner.device)
    words: str = processor.decode(captioner.generate(**inputs)[0], skip_special_tokens=True).strip()  # type: ignore[attr-defined]
    wanted = PREFIX in target and not words.lower().startswith(PREFIX.lower())
    return PREFIX + words if wanted else words
