"""How far an edit agrees with the words: CLIP's similarity and direction, on the embeddings of any scorer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor


class Scorer(Protocol):
    """Puts pictures and texts into one space, where what belongs together lies close.

    name: which one it is, for reports: figures of two scorers are not to be compared
    """

    @property
    def name(self) -> str: ...

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any sizes to unit rows, float32 [B, D] on the CPU."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit rows, float32 [B, D] on the CPU."""


def similarity(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of pictures and texts: does the picture show what the text says?

    images, texts: [..., D], unit rows, of shapes that broadcast
    Returns: [...] in [-1, 1]
    Source: Hessel et al. 2021, arXiv 2104.08718, without its factor and its cut at 0
    """
    return (images * texts).sum(-1)


def direction(source_images: Tensor, images: Tensor, source_texts: Tensor, target_texts: Tensor) -> Tensor:
    """Cosine of how the pictures changed and how the words did: did the change asked for happen, and little else?

    source_images, images, source_texts, target_texts: [..., D], unit rows, of shapes that broadcast: the photo and its
        caption, the edit and its target
    Returns: [...] in [-1, 1]; 0 where pictures or texts did not change at all, as nothing points anywhere
    Source: Gal et al. 2022, arXiv 2108.00946 (StyleGAN-NADA), 1 - its directional loss
    """
    return torch.cosine_similarity(images - source_images, target_texts - source_texts, dim=-1)
