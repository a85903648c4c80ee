"""What the tests of the forgetting merge share: inputs and the error rule."""

import torch

from forgedit_kernels import merge_weights_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place, relative to the largest truth: what one correct rounding may cost.
FLOORS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = {
    "one": [(1,)],
    "primes": [(7,), (31, 3), (127,), (8191,)],
    "empty-among-others": [(5,), (0, 3), (3,)],
    "many": [(i % 37 + 1, 5) for i in range(300)],
    "unet": [(320, 4, 3, 3), (320,), (1280, 320), (320, 768), (640, 320, 1, 1)],
}
KEEPS = (0.0, 1e-6, 0.3, 0.5, 0.999, 1.0)

Tensors = list[torch.Tensor]


def pair(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(seed)
    original = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tuned = [(w.float() + 0.3 * torch.randn(w.shape, generator=generator)).to(dtype) for w in original]
    return original, tuned


def poisoned(like: Tensors) -> Tensors:
    return [torch.full_like(w, float("nan")) for w in like]


def _error(got: Tensors, truth: Tensors) -> float:
    """The largest absolute error; infinite where a NaN is left."""
    gaps = torch.cat([(g.double() - t).abs().flatten() for g, t in zip(got, truth, strict=True)])
    return float("inf") if gaps.isnan().any() else float(gaps.max())


def check(original: Tensors, tuned: Tensors, keep: float, got: Tensors) -> bool:
    """STYLE's rule: at most twice the reference's own error in that dtype, plus the dtype's floor."""
    truth = [torch.empty_like(w, dtype=torch.float64) for w in tuned]
    merge_weights_reference([w.double() for w in original], [w.double() for w in tuned], keep, truth)
    reference = poisoned(got)
    merge_weights_reference(original, tuned, keep, reference)
    scale = max(float(t.abs().max()) for t in truth if t.numel())
    return _error(got, truth) <= 2 * _error(reference, truth) + FLOORS[got[0].dtype] * scale
