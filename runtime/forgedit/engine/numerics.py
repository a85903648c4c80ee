"""How exactly is computed: one switch of an editor."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

log = logging.getLogger("forgedit")

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


def warn_where_slow(numerics: str, device: torch.device) -> None:
    """Say so where half precision is emulated: on a CPU that has not even AVX-512."""
    capability = torch.backends.cpu.get_cpu_capability()
    if device.type == "cpu" and NUMERICS[numerics] != torch.float32 and capability in ("DEFAULT", "AVX2"):
        log.warning(
            "numerics %r is slower than 'exact' here, some five times: this CPU (%s) has no instructions for %s",
            numerics,
            capability,
            str(NUMERICS[numerics]).removeprefix("torch."),
        )


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
