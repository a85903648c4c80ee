"""What the native ops must do at least: a formula for each, of what its function in the native module is given.

While a profiler listens, each call's range carries its work into the trace, where `forgedit profile` and Perfetto read
it. Operations are those of matrix products, two for a multiplication and an addition, as torch.utils.flop_counter has
it; ops without a product have none, and are bound by memory. Bytes: each tensor read once, each written once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "": 0}  # '' is an absent copy
_ADAM8BIT_BLOCK = 256  # weights that share one scale of the moments and one of the squares

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """Of one call. flops: None where there is no product; dtype: such as 'bfloat16'; shapes: of its main tensors."""

    flops: int | None
    num_bytes: int
    dtype: str
    shapes: tuple[Shape, ...]

    def fields(self) -> dict[str, int | str]:
        """As a range of torch's profiler takes them; `read` makes them a Work again."""
        known: dict[str, int | str] = {"bytes": self.num_bytes, "dtype": self.dtype, "shapes": json.dumps(self.shapes)}
        return known if self.flops is None else {"flops": self.flops, **known}

    @classmethod
    def read(cls, fields: dict[str, Any]) -> Work:
        shapes = tuple(tuple(shape) for shape in json.loads(fields["shapes"]))
        return cls(fields.get("flops"), fields["bytes"], fields["dtype"], shapes)


def _heads(given: dict[str, Any]) -> tuple[Shape, Shape, int, int]:
    """Shapes of q and of k; elements of q, and of k and v together: those that exist, as a prompt's are broadcast."""
    batch, queries, keys, *head = (given[name] for name in ("batch", "queries", "keys", "heads", "dim"))
    q, k = (batch, queries, *head), (batch, keys, *head)
    held = sum(prod(k[1:] if given[name][0] == 0 else k) for name in ("k_strides", "v_strides"))
    return q, k, prod(q), held


def _attention(q: int, k: int, v: int, out: int, stats: int = 0, **given: Any) -> Work:
    """Both products; statistics are two float32 numbers a query and head."""
    q_shape, k_shape, queries, held = _heads(given)
    kept = 8 * queries // given["dim"] if stats else 0
    num_bytes = (2 * queries + held) * _BYTES[given["dtype"]] + kept
    return Work(4 * queries * given["keys"], num_bytes, given["dtype"], (q_shape, k_shape))


def _attention_backward(dout: int, q: int, k: int, v: int, stats: int, dq: int, dk: int, dv: int, **given: Any) -> Work:
    """The scores once more, the weights' gradients, and of dq, dk and dv what is wanted: at most 5 products."""
    q_shape, k_shape, queries, held = _heads(given)
    products = 2 + sum(map(bool, (dq, dk, dv)))
    written = queries * bool(dq) + prod(k_shape) * (bool(dk) + bool(dv))
    num_bytes = (2 * queries + held + written) * _BYTES[given["dtype"]] + 8 * queries // given["dim"]
    return Work(2 * products * queries * given["keys"], num_bytes, given["dtype"], (q_shape, k_shape))


def _map(shift: int, given: dict[str, Any]) -> tuple[Shape, int, int]:
    """Shape of x; elements of weight and bias, and of the shift, one picture's or all pictures'."""
    shape = tuple(given[name] for name in ("batch", "pixels", "channels"))
    shifts = shape[2] * (shape[0] if given["shift_stride"] else 1) if shift else 0
    return shape, 2 * shape[2], shifts


def _group_norm_silu(
    x: int, weight: int, bias: int, shift: int, out: int, stats: int = 0, *, dtype: str, **given: Any
) -> Work:
    shape, affine, shifts = _map(shift, given)
    kept = 8 * shape[0] * given["groups"] if stats else 0
    return Work(None, (2 * prod(shape) + affine + shifts) * _BYTES[dtype] + kept, dtype, (shape,))


def _group_norm_silu_backward(
    dout: int, x: int, weight: int, bias: int, shift: int, stats: int, *gradients: int, **given: Any
) -> Work:
    """It reads dout and all that the forward pass read, and writes the gradients, the shift's of each picture."""
    shape, affine, shifts = _map(shift, given)
    kept = 2 * shape[0] * given["groups"]
    elements = 3 * prod(shape) + 2 * affine + shifts + shape[0] * shape[2] + kept
    return Work(None, 4 * elements, "float32", (shape,))


def _geglu(*addresses: int, rows: int, features: int, dtype: str, **_: Any) -> Work:
    """Of [rows, 2 * features] and [rows, features]."""
    return Work(None, 3 * rows * features * _BYTES[dtype], dtype, ((rows, 2 * features),))


def _geglu_backward(*addresses: int, rows: int, features: int, dtype: str, **_: Any) -> Work:
    """A second [rows, 2 * features] is written."""
    return Work(None, 5 * rows * features * _BYTES[dtype], dtype, ((rows, 2 * features),))


def _merge_weights(
    original: Sequence[int], tuned: Sequence[int], out: Sequence[int], counts: Sequence[int], *, dtype: str, **_: Any
) -> Work:
    return Work(None, 3 * sum(counts) * _BYTES[dtype], dtype, ((sum(counts),),))


def _adam(table: Sequence[Sequence[int]], sizes: Sequence[float], *, gradient: str, copy: str, **_: Any) -> Work:
    """Param, moment and square are read and written, in float32."""
    count = sum(row[-1] for row in table)
    return Work(None, count * (24 + _BYTES[gradient] + _BYTES[copy]), "float32", ((count,),))


def _adam8bit(
    table: Sequence[Sequence[int]],
    sizes: Sequence[float],
    maps: Sequence[int],
    *,
    gradient: str,
    copy: str,
    **_: Any,
) -> Work:
    """Param in float32, two bytes of codes, and two float32 scales a block are read and written."""
    counts = [row[-1] for row in table]
    blocks = sum(-(-count // _ADAM8BIT_BLOCK) for count in counts)
    num_bytes = sum(counts) * (12 + _BYTES[gradient] + _BYTES[copy]) + 16 * blocks
    return Work(None, num_bytes, "float32", ((sum(counts),),))


# By the native functions' names.
WORK: dict[str, Callable[..., Work]] = {
    "adam": _adam,
    "adam8bit": _adam8bit,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "geglu": _geglu,
    "geglu_backward": _geglu_backward,
    "group_norm_silu": _group_norm_silu,
    "group_norm_silu_backward": _group_norm_silu_backward,
    "merge_weights": _merge_weights,
}
