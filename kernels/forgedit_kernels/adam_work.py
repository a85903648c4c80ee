"""What the plans of adam.py and adam8bit.py share: arguments checked, steps counted on the device, tables of work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forgedit_kernels.adam_triton import COPIES, GRADIENTS, tl_dtype
from forgedit_kernels.dispatch import Obstacle, choose, native_module, native_obstacle, triton_obstacle
from forgedit_kernels.table import preferred


class Corrections:
    """The step count, and the bias corrections that follow from it, on the device.

    step: int64 [], updates so far; scales: float64 [1 + tensors], sqrt(1 - beta2^t), then lr / (1 - beta1^t) of each
    """

    def __init__(self, rates: Sequence[float], betas: tuple[float, float], device: torch.device) -> None:
        self.betas = betas
        self._rates = torch.tensor(rates, dtype=torch.float64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.scales = torch.empty(1 + len(rates), dtype=torch.float64, device=device)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to step 0, at which no update is defined: the scales are NaN until the first advance."""
        self.step.zero_()
        self.scales.fill_(float("nan"))

    @torch.no_grad()
    def advance(self) -> None:
        """Count one step. On CUDA nothing waits for it, and a graph may capture it."""
        self.step.add_(1)
        time = self.step.double()
        torch.sqrt(1 - self.betas[1] ** time, out=self.scales[0])
        torch.div(self._rates, 1 - self.betas[0] ** time, out=self.scales[1:])

    def scales_of(self, chosen: slice) -> Tensor:
        """As `scales`, of some of the tensors."""
        return torch.cat((self.scales[:1], self.scales[1:][chosen]))


@dataclass(frozen=True)
class Given:
    """A plan's arguments, listed and checked; rates: the lr of each param."""

    params: list[Tensor]
    gradients: list[Tensor] | None
    copies: list[Tensor] | None
    rates: list[float]
    betas: tuple[float, float]
    eps: float
    num_threads: int | None

    @classmethod
    def checked(
        cls,
        params: Iterable[Tensor],
        gradients: Iterable[Tensor] | None,
        copies: Iterable[Tensor] | None,
        lr: float | Sequence[float],
        betas: tuple[float, float],
        eps: float,
        num_threads: int | None,
    ) -> Given:
        """Raises: ValueError for arguments that AdamPlan does not take"""
        listed = list(params)
        grads, rounded = (None if tensors is None else list(tensors) for tensors in (gradients, copies))
        rates = [float(lr)] * len(listed) if isinstance(lr, (int, float)) else list(lr)
        check_tensors(listed, grads, rounded)
        _check_settings(len(listed), rates, betas, eps, num_threads)
        return cls(listed, grads, rounded, rates, betas, eps, num_threads)

    @property
    def device(self) -> torch.device:
        return self.params[0].device if self.params else torch.device("cpu")

    @property
    def copy_dtype(self) -> torch.dtype | None:
        return self.copies[0].dtype if self.copies else None

    def part(self, indices: Sequence[int]) -> Given:
        """Of the params of these indices."""

        def picked(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[index] for index in indices]

        gradients, copies = (None if tensors is None else picked(tensors) for tensors in (self.gradients, self.copies))
        rates = [self.rates[index] for index in indices]
        return Given(picked(self.params), gradients, copies, rates, self.betas, self.eps, self.num_threads)

    def choose(self, op: str, backend: str, more: Mapping[str, Obstacle]) -> str:
        """The backend that runs `op`. more: obstacles of backends that the other plan does not have"""
        dtype = self.params[0].dtype if self.params else torch.float32
        obstacles: dict[str, Obstacle] = {
            "triton": lambda: triton_obstacle(self.device, dtype, (torch.float32,)),
            "native": lambda: native_obstacle(self.device, dtype, (torch.float32,)),
        }
        key = f"float32 to {str(self.copy_dtype)[6:]}" if self.copy_dtype else "float32"
        return choose(op, backend, obstacles | dict(more), preferred(op, self.device, key))


class Work:
    """The tensors of a plan as its kernels take them.

    columns: each tensor's parts, the gradients second; see work_table
    block: elements that one program of the Triton kernel updates
    """

    def __init__(
        self,
        given: Given,
        columns: Sequence[Sequence[Tensor] | None],
        corrections: Corrections,
        backend: str,
        block: int,
    ) -> None:
        self._given, self._corrections = given, corrections
        # differences are taken in float64, then rounded
        beta1, beta2 = given.betas
        self._numbers = {"new1": 1 - beta1, "keep2": beta2, "new2": 1 - beta2, "eps": given.eps}
        counts = [w.numel() for w in given.params]
        table = work_table(columns, counts)
        if backend == "triton":
            self.align = alignment(table[:, :-1].flatten().tolist())
            blocks, self._starts = work_blocks(counts, block)
            self._tables = table.to(given.device), blocks.to(given.device)
        if backend == "native":
            self._rows = table.tolist()

    def launch(
        self, kernel: Any, chosen: slice, gradient: torch.dtype, address: int, *maps: Tensor, **own: Any
    ) -> None:
        """Run a Triton kernel. gradient: its dtype; address: as a plan's _update has it; maps, own: the kernel's own"""
        table, blocks = self._tables
        first, *_, last = self._starts[chosen.start : None if chosen.stop is None else chosen.stop + 1]
        with torch.cuda.device_of(table):
            if last > first:
                kernel[(last - first,)](
                    table,
                    blocks,
                    self._corrections.scales,
                    *maps,
                    address,
                    first,
                    **self._numbers,
                    GRADIENT=tl_dtype(gradient),
                    COPY=tl_dtype(self._given.copy_dtype),
                    ALIGN=min(self.align, alignment([address])),
                    **own,
                )
        self.mark_written(chosen)

    def call(
        self, op: str, chosen: slice, gradient: torch.dtype, address: int, instructions: str, *maps: Any, **own: Any
    ) -> None:
        """The same of the C++ module. instructions: one of its instruction_sets(); '' takes the widest"""
        native = native_module()
        assert native is not None, "dispatch chose an absent module"
        root, *sizes = self._corrections.scales.tolist()
        getattr(native, op)(
            [[row[0], address or row[1], *row[2:]] for row in self._rows[chosen]],
            sizes[chosen],
            *maps,
            root=root,
            **self._numbers,
            gradient=str(gradient)[6:],
            copy=str(self._given.copy_dtype)[6:] if self._given.copy_dtype else "",
            threads=self._given.num_threads or torch.get_num_threads(),
            instruction_set=instructions or native.instruction_sets()[-1],
            **own,
        )
        self.mark_written(chosen)

    def mark_written(self, chosen: slice) -> None:
        """Tell autograd what was written behind its back."""
        copies = self._given.copies or []
        torch.autograd.graph.increment_version([*self._given.params[chosen], *copies[chosen]])


def work_table(columns: Sequence[Sequence[Tensor] | None], counts: Sequence[int]) -> Tensor:
    """Addresses of each tensor's parts, 0 for those there are none of, then its count: int64 [tensors, columns + 1]."""
    addresses = [[0] * len(counts) if parts is None else [part.data_ptr() for part in parts] for parts in columns]
    return torch.tensor([*addresses, counts], dtype=torch.int64).T.contiguous()


def work_blocks(counts: Sequence[int], size: int) -> tuple[Tensor, list[int]]:
    """Tensors of `counts` elements cut into blocks of `size`.

    Returns: int32 [blocks, 2], tensor and block in it; and the first block of each tensor, then the number of blocks
    """
    blocks = (torch.tensor(counts, dtype=torch.int64) + size - 1) // size
    tensor = torch.repeat_interleave(blocks)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), blocks.cumsum(0)))
    block = torch.arange(len(tensor)) - starts[tensor]
    return torch.stack((tensor, block), dim=1).to(torch.int32), starts.tolist()


def alignment(addresses: Iterable[int]) -> int:
    """Bytes that divide all the addresses, as the kernels use them: 16, or 1 where one is odd."""
    return 16 if all(address % 16 == 0 for address in addresses) else 1


def check_tensors(
    params: Sequence[Tensor], gradients: Sequence[Tensor] | None, copies: Sequence[Tensor] | None
) -> None:
    """Raises: ValueError if the lists do not fit together, see AdamPlan"""
    if not params:
        return
    dtype, device = params[0].dtype, params[0].device
    lists: dict[str, tuple[Sequence[Tensor], tuple[torch.dtype, ...]]] = {"params": (params, (dtype,))}
    if gradients is not None:
        lists["gradients"] = gradients, (*GRADIENTS, dtype)
    if copies is not None:
        lists["copies"] = copies, COPIES
    if not dtype.is_floating_point:
        raise ValueError(f"params must be floating point, got {dtype}")
    for name, (tensors, dtypes) in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must be as many as params, {len(params)}, got {len(tensors)}")
        if tensors[0].dtype not in dtypes:
            allowed = ", ".join(sorted({str(allowed) for allowed in dtypes}))
            raise ValueError(f"{name} must be one of {allowed}, got {tensors[0].dtype}")
        for index, (w, p) in enumerate(zip(tensors, params, strict=True)):
            if w.dtype != tensors[0].dtype or w.device != device:
                raise ValueError(f"{name}[{index}] must be {tensors[0].dtype} on {device}, got {w.dtype} on {w.device}")
            if w.shape != p.shape or _order(w) != _order(p):
                raise ValueError(
                    f"{name}[{index}] must have the shape and strides of params[{index}], {list(p.shape)} and "
                    f"{p.stride()}, got {list(w.shape)} and {w.stride()}"
                )
            if not (w.is_contiguous() or (w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last))):
                raise ValueError(
                    f"{name}[{index}] must be contiguous or channels_last, got strides {w.stride()} for shape "
                    f"{list(w.shape)}"
                )


def _check_settings(
    count: int, rates: Sequence[float], betas: tuple[float, float], eps: float, num_threads: int | None
) -> None:
    """Raises: ValueError for settings outside their range"""
    if len(rates) != count:
        raise ValueError(f"lr must be one number or one for each of the {count} params, got {len(rates)}")
    if not all(rate >= 0 for rate in rates):
        raise ValueError(f"lr must be at least 0, got {min(rates)}")
    if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")


def _order(w: Tensor) -> list[int]:
    """Its strides where they say something about the order in memory."""
    return [stride for size, stride in zip(w.shape, w.stride(), strict=True) if size > 1]
