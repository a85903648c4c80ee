"""How exactly is computed: one switch of an editor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What the engine computes in. 'reference' is no engine: the method's plain path, in float32 by diffusers' own modules.
NUMERICS: dict[str, torch.dtype] = {
    "reference": torch.float32,
    "exact": torch.float32,
    "fast": torch.bfloat16,
    "fast-float16": torch.float16,
}


def check_numerics(numerics: str) -> None:
    """Raises: ValueError for an unknown name."""
    if numerics not in NUMERICS:
        raise ValueError(f"unknown numerics {numerics!r}; expected one of: {', '.join(NUMERICS)}")


@contextmanager
def true_float32() -> Iterator[None]:
    """float32 products as float32, where torch may take TF32 on a GPU (for convolutions it does so by default).

    The settings are torch's, for the whole process; they are put back.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
