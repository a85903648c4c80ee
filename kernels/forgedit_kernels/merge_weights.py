"""The forgetting merge, over many tensors in one call: w = keep * tuned + (1 - keep) * original.

Source: Forgedit, arXiv 2309.10556 (forgetting), with keep its sigma.
Least work per element: read two, write one (12 bytes in float32, 6 in the 16-bit types), 3 operations: bound by memory.

The native path computes in float32 and rounds once, to nearest even. It uses no fused multiply-add, so in float32 it
equals the reference bit for bit; in the 16-bit types it is more exact, as the reference rounds every product.
"""

from collections.abc import Iterable, Sequence

import torch

from forgedit_kernels.dispatch import choose, native_module, native_obstacle

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def merge_weights_reference(
    original: Sequence[torch.Tensor],
    tuned: Sequence[torch.Tensor],
    keep: float,
    out: Sequence[torch.Tensor],
) -> None:
    """The merge in plain torch, in the tensors' own dtype, into `out`. Copies where keep is 0 or 1."""
    for w_original, w_tuned, w in zip(original, tuned, out, strict=True):
        if keep == 0 or keep == 1:
            w.copy_(w_tuned if keep else w_original)
        else:
            w.copy_(keep * w_tuned + (1 - keep) * w_original)


def _merge_weights_native(
    original: Sequence[torch.Tensor],
    tuned: Sequence[torch.Tensor],
    keep: float,
    out: Sequence[torch.Tensor],
    num_threads: int,
    instruction_set: str | None = None,
) -> None:
    """The merge in C++. instruction_set: one of the module's `instruction_sets()`, None the widest."""
    native = native_module()
    assert native is not None, "dispatch chose an absent module"
    native.merge_weights(
        [w.data_ptr() for w in original],
        [w.data_ptr() for w in tuned],
        [w.data_ptr() for w in out],
        [w.numel() for w in out],
        dtype=str(out[0].dtype).removeprefix("torch."),
        keep=keep,
        threads=num_threads,
        instruction_set=instruction_set or native.instruction_sets()[-1],
    )
    for w in out:
        torch.autograd.graph.increment_version(w)  # written behind autograd's back


def merge_weights(
    original: Iterable[torch.Tensor],
    tuned: Iterable[torch.Tensor],
    keep: float,
    out: Iterable[torch.Tensor] | None = None,
    *,
    backend: str = "auto",
    num_threads: int | None = None,
) -> list[torch.Tensor]:
    """keep * tuned + (1 - keep) * original for each pair; no gradients.

    original, tuned: equally many tensors, pairwise of one shape; all of one floating dtype, device; contiguous
    keep: in [0, 1]; 0 gives exactly `original`, 1 exactly `tuned`
    out: tensors to write, like `tuned`; each may be its own `original` or `tuned`, and must not overlap them otherwise
    num_threads: of the native backend; None takes torch.get_num_threads(). The result does not depend on it
    Returns: `out`, or new tensors
    Raises: ValueError for arguments; RuntimeError if a named backend cannot run
    """
    original, tuned = list(original), list(tuned)
    out = [torch.empty_like(w) for w in tuned] if out is None else list(out)
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be in [0, 1], got {keep}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    if not len(original) == len(tuned) == len(out):
        raise ValueError(
            f"original, tuned and out must be equally many tensors, got {len(original)}, {len(tuned)}, {len(out)}"
        )
    device = tuned[0].device if tuned else torch.device("cpu")
    dtype = tuned[0].dtype if tuned else torch.float32
    obstacles = {"native": lambda: native_obstacle(device, dtype, _NATIVE_DTYPES)}
    chosen = choose("merge_weights", backend, obstacles)
    if not tuned:
        return out
    if not dtype.is_floating_point:
        raise ValueError(f"weights must be floating point, got {dtype}")
    for index, (w_original, w_tuned, w_out) in enumerate(zip(original, tuned, out, strict=True)):
        for name, w in (("original", w_original), ("tuned", w_tuned), ("out", w_out)):
            if w.shape != w_tuned.shape:
                raise ValueError(
                    f"{name}[{index}] must have the shape of tuned[{index}], {list(w_tuned.shape)}, got {list(w.shape)}"
                )
            if w.dtype != dtype or w.device != device:
                raise ValueError(f"{name}[{index}] must be {dtype} on {device}, got {w.dtype} on {w.device}")
            if not w.is_contiguous():
                raise ValueError(
                    f"{name}[{index}] must be contiguous, got strides {w.stride()} for shape {list(w.shape)}"
                )
    if chosen == "native":
        _merge_weights_native(original, tuned, keep, out, num_threads or torch.get_num_threads())
    else:
        merge_weights_reference(original, tuned, keep, out)
    return out
