"""The forgetting merge, over many tensors in one call: w = keep * tuned + (1 - keep) * original.

Source: Forgedit, arXiv 2309.10556 (forgetting), with keep its sigma.
Least work per element: read two, write one (12 bytes in float32, 6 in the 16-bit types), 3 operations: bound by memory.
Where keep is 0 or 1 one is read: that side is copied, without a product, so that an infinite weight of the other
leaves no NaN.

The native and the Triton path compute in float32 and round once, to nearest even. They use no fused multiply-add, so
from float32 they equal the reference bit for bit; from the 16-bit types they are more exact, as the reference rounds
every product.

What an engine keeps may differ from what it is merged from: convolution weights in channels_last, a 16-bit dtype. A
[O, I, H, W] weight is then [O * I, H * W] to be turned for each O, in tiles of whole runs of the source.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from forgedit_kernels.dispatch import choose, native_module, native_obstacle, triton_obstacle
from forgedit_kernels.jit import Variant, jit, tl
from forgedit_kernels.table import preferred

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A tile is FLAT elements where the layouts agree, else ROWS of the source, COLUMNS wide (a 3x3 weight uses 9).
_BLOCKS = {"FLAT": 2048, "ROWS": 128, "COLUMNS": 16, "TILES": 8}
_WARPS = 4


@torch.no_grad()
def merge_weights_reference(
    original: Sequence[Tensor],
    tuned: Sequence[Tensor],
    keep: float,
    out: Sequence[Tensor],
) -> None:
    """The merge in plain torch, in the inputs' own dtype, then copied into `out`. Copies alone where keep is 0 or 1."""
    for w_original, w_tuned, w in zip(original, tuned, out, strict=True):
        if keep == 0 or keep == 1:
            w.copy_(w_tuned if keep else w_original)
        else:
            w.copy_(keep * w_tuned + (1 - keep) * w_original)


@jit
def _merged(original_ptr, tuned_ptr, offsets, valid, keep, forget, OUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile in `OUT`. A side of weight 0 is not read."""
    original = tl.load(original_ptr + offsets, mask=valid & (forget != 0), other=0)
    tuned = tl.load(tuned_ptr + offsets, mask=valid & (keep != 0), other=0)
    mixed = (keep * tuned.to(tl.float32) + forget * original.to(tl.float32)).to(OUT)
    return tl.where(keep == 0, original.to(OUT), tl.where(forget == 0, tuned.to(OUT), mixed))


@jit
def _merge_weights_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    blocks_ptr,
    keep,
    forget,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    FLAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program merges one block, TILES tiles, of one tensor; table and blocks: see _work."""
    block_ptr = blocks_ptr + 2 * tl.program_id(0).to(tl.int64)
    tensor_ptr = table_ptr + 6 * tl.load(block_ptr).to(tl.int64)
    block = tl.load(block_ptr + 1).to(tl.int64)
    original_ptr = tl.load(tensor_ptr).to(tl.pointer_type(IN))
    tuned_ptr = tl.load(tensor_ptr + 1).to(tl.pointer_type(IN))
    out_ptr = tl.load(tensor_ptr + 2).to(tl.pointer_type(OUT))
    rows, channels, spatial = tl.load(tensor_ptr + 3), tl.load(tensor_ptr + 4), tl.load(tensor_ptr + 5)
    if spatial == 1:
        start = block * TILES * FLAT
        for first in range(start, tl.minimum(start + TILES * FLAT, rows), FLAT):
            offsets = tl.arange(0, FLAT)
            valid = offsets < rows - first
            merged = _merged(original_ptr + first, tuned_ptr + first, offsets, valid, keep, forget, OUT)
            tl.store(out_ptr + first + offsets, merged, mask=valid)
    else:
        start = block * TILES * ROWS
        # within a tile 32 bits do: the plan turns no output channel of 2^30 elements
        width, size = channels.to(tl.int32), spatial.to(tl.int32)
        for first in range(start, tl.minimum(start + TILES * ROWS, rows), ROWS):
            # rows count from the start of the output channel in which the tile begins
            corner = (first // channels) * channels * spatial
            row = (first % channels).to(tl.int32) + tl.arange(0, ROWS)
            turned = row // width * width * size + row % width
            inside = tl.arange(0, ROWS) < rows - first
            for left in range(0, size, COLUMNS):
                column = left + tl.arange(0, COLUMNS)
                read = row[:, None] * size + column[None, :]
                valid = inside[:, None] & (column[None, :] < size)
                merged = _merged(original_ptr + corner, tuned_ptr + corner, read, valid, keep, forget, OUT)
                # turned over before it is stored, so that neighbouring threads write neighbouring channels
                write = turned[None, :] + column[:, None] * width
                valid = inside[None, :] & (column[:, None] < size)
                tl.store(out_ptr + corner + write, tl.trans(merged), mask=valid)


def _work(original: Sequence[Tensor], tuned: Sequence[Tensor], out: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What the programs do, on the tensors' device.

    Returns: table int64 [tensors, 6]: the three addresses, then rows, channels, spatial: for a [O, I, H, W] weight to
        be turned O * I, I, H * W, else its elements, 1, 1; and blocks int32 [programs, 2]: tensor, block in it
    """
    lines = []
    for w_original, w_tuned, w in zip(original, tuned, out, strict=True):
        count, channels, spatial = w.numel(), 1, 1
        if not w.is_contiguous():
            channels, spatial = w.shape[1], w.shape[2] * w.shape[3]
        addresses = w_original.data_ptr(), w_tuned.data_ptr(), w.data_ptr()
        lines.append((*addresses, count // spatial, channels, spatial))
    table = torch.tensor(lines, dtype=torch.int64)
    size = _BLOCKS["TILES"] * torch.where(table[:, 5] == 1, _BLOCKS["FLAT"], _BLOCKS["ROWS"])
    counts = (table[:, 3] + size - 1) // size
    tensor = torch.repeat_interleave(counts)
    block = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    device = out[0].device
    return table.to(device), torch.stack((tensor, block), dim=1).to(torch.int32).to(device)


def _merge_weights_triton(work: tuple[Tensor, Tensor], keep: float, dtype: torch.dtype, out: Sequence[Tensor]) -> None:
    """The merge in one launch; work: of _work; dtype: the inputs'."""
    table, blocks = work
    with torch.cuda.device_of(table):
        if len(blocks):
            _merge_weights_kernel[(len(blocks),)](
                table,
                blocks,
                float(keep),
                1.0 - keep,
                IN=_tl_dtype(dtype),
                OUT=_tl_dtype(out[0].dtype),
                **_BLOCKS,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
    torch.autograd.graph.increment_version(out)  # written behind autograd's back


def _tl_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def variants() -> list[Variant]:
    """The shipped configurations: from float32 weights to an engine's, and within one dtype."""
    f32, bf16, f16 = _DTYPES
    pairs = [(f32, f32), (f32, bf16), (f32, f16), (bf16, bf16), (f16, f16)] if tl else []
    signature = {"table_ptr": "*i64", "blocks_ptr": "*i32", "keep": "fp32", "forget": "fp32"}
    return [
        Variant(
            name=f"merge_weights {str(source)[6:]} to {str(target)[6:]}",
            kernel=_merge_weights_kernel,
            signature=signature,
            constexprs={"IN": _tl_dtype(source), "OUT": _tl_dtype(target), **_BLOCKS},
            num_warps=_WARPS,
        )
        for source, target in pairs
    ]


def _merge_weights_native(
    original: Sequence[Tensor],
    tuned: Sequence[Tensor],
    keep: float,
    out: Sequence[Tensor],
    num_threads: int,
    instruction_set: str | None = None,
) -> None:
    """The merge in C++, of equal dtypes and layouts. instruction_set: of the module's; None takes the widest."""
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
    torch.autograd.graph.increment_version(out)  # written behind autograd's back


class MergePlan:
    """A merge of given tensors, checked and listed once, then run with any `keep`. Arguments as in merge_weights.

    It holds the tensors, and goes stale where one of them is given other storage.
    backend: the chosen one
    """

    def __init__(
        self,
        original: Iterable[Tensor],
        tuned: Iterable[Tensor],
        out: Iterable[Tensor],
        *,
        backend: str = "auto",
        num_threads: int | None = None,
    ) -> None:
        self.original, self.tuned, self.out = list(original), list(tuned), list(out)
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        _check(self.original, self.tuned, self.out)
        source = self.tuned[0] if self.tuned else torch.empty(0)
        target = self.out[0] if self.out else source
        self._num_threads = num_threads
        plain = [target.dtype == source.dtype and w.is_contiguous() for w in self.out]

        def native() -> str | None:
            if backend == "native" and not all(plain):
                return "some of out differ from their inputs in dtype or layout"
            return native_obstacle(source.device, source.dtype, _DTYPES)

        def triton() -> str | None:
            if any(not w.is_contiguous() and w.numel() // w.shape[0] >= 2**30 for w in self.out):
                return "it turns no output channel of 2^30 elements or more"
            obstacles = (triton_obstacle(w.device, w.dtype, _DTYPES) for w in (source, target))
            return next((obstacle for obstacle in obstacles if obstacle), None)

        measured = preferred("merge_weights", source.device, shape_key(source.dtype, target.dtype))
        self.backend = choose("merge_weights", backend, {"triton": triton, "native": native}, measured)
        sides = (self.original, self.tuned, self.out)
        self._work = _work(*sides) if self.backend == "triton" and self.out else None
        native_ones = plain if self.backend == "native" else [False] * len(plain)
        self._native = [list(itertools.compress(side, native_ones)) for side in sides]
        self._others = [list(itertools.compress(side, map(operator.not_, native_ones))) for side in sides]

    def run(self, keep: float) -> None:
        """Merge into `out`. Raises: ValueError for a keep outside [0, 1]"""
        if not 0 <= keep <= 1:
            raise ValueError(f"keep must be in [0, 1], got {keep}")
        if self._work is not None:
            _merge_weights_triton(self._work, keep, self.tuned[0].dtype, self.out)
            return
        original, tuned, out = self._others
        merge_weights_reference(original, tuned, keep, out)
        original, tuned, out = self._native
        if out:
            _merge_weights_native(original, tuned, keep, out, self._num_threads or torch.get_num_threads())


def _check(original: list[Tensor], tuned: list[Tensor], out: list[Tensor]) -> None:
    if not len(original) == len(tuned) == len(out):
        counts = f"{len(original)}, {len(tuned)}, {len(out)}"
        raise ValueError(f"original, tuned and out must be equally many tensors, got {counts}")
    if not tuned:
        return
    device, dtypes = tuned[0].device, {"original": tuned[0].dtype, "tuned": tuned[0].dtype, "out": out[0].dtype}
    if not all(dtype.is_floating_point for dtype in dtypes.values()):
        raise ValueError(f"weights must be floating point, got {tuned[0].dtype} and {out[0].dtype} for out")
    for index, triple in enumerate(zip(original, tuned, out, strict=True)):
        shape = triple[1].shape
        for (name, dtype), w in zip(dtypes.items(), triple, strict=True):
            if w.shape != shape:
                raise ValueError(
                    f"{name}[{index}] must have the shape of tuned[{index}], {list(shape)}, got {list(w.shape)}"
                )
            if w.dtype != dtype or w.device != device:
                raise ValueError(f"{name}[{index}] must be {dtype} on {device}, got {w.dtype} on {w.device}")
            if not (w.is_contiguous() or (name == "out" and _is_channels_last(w))):
                allowed = "contiguous or channels_last" if name == "out" else "contiguous"
                raise ValueError(
                    f"{name}[{index}] must be {allowed}, got strides {w.stride()} for shape {list(w.shape)}"
                )


def _is_channels_last(w: Tensor) -> bool:
    return w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last)


def shape_key(dtype: torch.dtype, out_dtype: torch.dtype) -> str:
    """The measured table's key of a merge."""
    return f"{str(dtype)[6:]} to {str(out_dtype)[6:]}"


def merge_weights(
    original: Iterable[Tensor],
    tuned: Iterable[Tensor],
    keep: float,
    out: Iterable[Tensor] | None = None,
    *,
    backend: str = "auto",
    num_threads: int | None = None,
) -> list[Tensor]:
    """keep * tuned + (1 - keep) * original for each pair; no gradients. To repeat it, keep a MergePlan.

    original, tuned: equally many tensors, pairwise of one shape; all of one floating dtype, device; contiguous
    keep: in [0, 1]; 0 gives exactly `original`, 1 exactly `tuned`, each rounded to out's dtype
    out: tensors to write, shaped like `tuned`, all of one floating dtype, each contiguous or channels_last; each may be
        its own `original` or `tuned`, and must not overlap them otherwise
    backend: 'native' takes tensors whose dtype and layout agree; with 'auto' the reference does the others
    num_threads: of the native backend; None takes torch.get_num_threads(). The result does not depend on it
    Returns: `out`, or new tensors like `tuned`
    Raises: ValueError for arguments; RuntimeError if a named backend cannot run
    """
    tuned = list(tuned)
    out = [torch.empty_like(w) for w in tuned] if out is None else list(out)
    MergePlan(original, tuned, out, backend=backend, num_threads=num_threads).run(keep)
    return out
