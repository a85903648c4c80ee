"""The edit embedding: source and target combined, token by token along the channel axis (METHOD section 3)."""

from __future__ import annotations

from torch import Tensor

from forgedit.config import EditConfig


def blend_embeddings(source: Tensor, target: Tensor, config: EditConfig) -> Tensor:
    """Combine the embeddings as config.blend says.

    source, target: [1, T, D], one dtype
    'vs': gamma * target + (1 - gamma) * source
    'vp': identity_weight * source + edit_weight * (the part of target orthogonal to source)
    Returns: [1, T, D]
    Raises: ValueError if the shapes differ
    Source: Forgedit, arXiv 2309.10556, section 3.3
    """
    if source.shape != target.shape:
        raise ValueError(f"source {tuple(source.shape)} and target {tuple(target.shape)} must have one shape")
    if config.blend == "vs":
        return config.gamma * target + (1 - config.gamma) * source
    unit = source / source.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    along = (target * unit).sum(dim=-1, keepdim=True)
    return config.identity_weight * source + config.edit_weight * (target - along * unit)
