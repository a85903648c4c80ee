"""What ops must do at least: floating-point operations by torch's own formulas, and bytes moved, from their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from forgedit.progress import PREFIX

Key = tuple[str, tuple[tuple[int, ...], ...]]  # an op's name, and the shapes of its tensors that have axes

# of the ops that write a tensor they are given, those that do not read it
WRITE_ONLY = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_", "aten::random_")
# give memory and touch none of it
ALLOCATING = ("aten::empty", "aten::new_empty")
# read no more of their first tensor than they return
GATHERING = ("aten::embedding", "aten::gather", "aten::index", "aten::index_select")


@dataclass
class Count:
    """Calls of one op on tensors of one shape, all together.

    flops: a multiplication and an addition are two; None where torch has no formula for the op
    num_bytes: each tensor read once, each written once; views and allocations move none
    dtype: of its first floating tensor, such as 'bfloat16'; 'none' if it has none
    """

    calls: int = 0
    flops: float | None = None
    num_bytes: float = 0.0
    dtype: str = "none"


class Counter(TorchDispatchMode):
    """Counts the ops that run inside `with Counter() as counter:`, those of a backward pass included.

    phases: by the outermost range of ours around the ops, '' where there is none. Kernels that are not torch's ops are
        not seen: native ones tell the trace what they do (forgedit_kernels.native_work), Triton's run in graphs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, dict[Key, Count]] = {}
        self._ranges: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if name == "profiler::_record_function_enter_new":
            self._ranges.append(args[0])
        elif name == "profiler::_record_function_exit":
            self._ranges.pop()
        else:
            phase = next((one.removeprefix(PREFIX) for one in self._ranges if one.startswith(PREFIX)), "")
            self._add(self.phases.setdefault(phase, {}), func, args, kwargs, out)
        return out

    def _add(
        self, counts: dict[Key, Count], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        name = func._schema.name
        given: list[Tensor] = []  # as the trace will tell them
        read: list[Tensor] = []
        written: list[Tensor] = []
        for place, argument in enumerate(func._schema.arguments):
            tensors = _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
            if str(argument.type) != "List[Optional[Tensor]]":  # those the profiler does not record
                given += tensors
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += tensors
                if argument.kwarg_only or name in WRITE_ONLY:
                    continue
            read += tensors
        shapes = tuple(tuple(tensor.shape) for tensor in given if tensor.dim())
        count = counts.setdefault((name, shapes), Count())
        count.calls += 1
        count.num_bytes += _least_bytes(name, read, written, _new(out, [*read, *written]))
        floating = (tensor for tensor in [*read, *written, *_tensors(out)] if tensor.is_floating_point())
        count.dtype = next((str(tensor.dtype).removeprefix("torch.") for tensor in floating), "none")
        formula = FORMULAS.get(name) or flop_registry.get(func._overloadpacket)
        if formula is not None:
            count.flops = (count.flops or 0.0) + formula(*args, **kwargs, out_val=out)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> float:
    return float(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> float:
    return float(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


# the CPU's attention, which torch's table lacks
FORMULAS: dict[str, Callable[..., float]] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _new(out: Any, given: Iterable[Tensor]) -> list[Tensor]:
    """The results that are neither given tensors nor views of them."""
    held = {tensor.untyped_storage()._cdata for tensor in given}
    return [tensor for tensor in _tensors(out) if tensor.untyped_storage()._cdata not in held]


def _least_bytes(name: str, read: list[Tensor], written: list[Tensor], new: list[Tensor]) -> int:
    if name.startswith(ALLOCATING) or not (new or written):
        return 0
    moved = _num_bytes([*new, *written])
    if name in GATHERING:
        return moved + min(_num_bytes(read[:1]), moved) + _num_bytes(read[1:])
    return moved + _num_bytes(read)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct tensors, and of the elements that exist: an expanded tensor repeats some."""
    distinct = {(tensor.data_ptr(), tuple(tensor.shape), tensor.dtype): tensor for tensor in tensors}
    return sum(min(one.numel() * one.element_size(), one.untyped_storage().nbytes()) for one in distinct.values())
