"""What the attention kernels share: rows of a head read and written in two pieces whose widths are powers of 2."""

from __future__ import annotations

import torch

from forgedit_kernels.jit import jit, tl

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # with Triton's names


@jit
def load_piece(  # type: ignore[no-untyped-def]
    ptr,
    stride,
    rows_left,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Columns FIRST to FIRST + WIDTH of ROWS rows; zero past column D and, if RAGGED, past `rows_left` rows."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = FIRST + tl.arange(0, WIDTH)[None, :]
    ptrs = ptr + rows * stride + columns
    if RAGGED and FIRST + WIDTH > D:
        piece = tl.load(ptrs, mask=(rows < rows_left) & (columns < D), other=0.0)
    elif RAGGED:
        piece = tl.load(ptrs, mask=rows < rows_left, other=0.0)
    elif FIRST + WIDTH > D:
        piece = tl.load(ptrs, mask=columns < D, other=0.0)
    else:
        piece = tl.load(ptrs)
    if INTERPRET:  # its products of bfloat16 are wrong
        piece = piece.to(tl.float32)
    return piece


@jit
def store_piece(ptr, stride, rows_left, piece, FIRST: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The result's columns from FIRST on, as far as they are columns and rows of it."""
    rows = tl.arange(0, piece.shape[0])[:, None]
    columns = FIRST + tl.arange(0, piece.shape[1])[None, :]
    piece = piece.to(ptr.dtype.element_ty)
    tl.store(ptr + rows * stride + columns, piece, mask=(rows < rows_left) & (columns < D))


def pieces(head_dim: int, least: int) -> tuple[int, int]:
    """Two powers of 2, at least `least` wide, that cover the head dim; the second is 0 where one does."""
    first = max(least, 1 << head_dim.bit_length() - 1)
    rest = max(0, head_dim - first)
    return first, rest and max(least, 1 << (rest - 1).bit_length())


def capability_of(device: torch.device) -> int | None:
    """90 for sm_90; None for the CPU, which has the interpreter alone."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
