"""Adam over many tensors in one launch, the steps counted on the device.

t <- t + 1
m <- m + (1 - beta1) * (g - m)
v <- beta2 * v + (1 - beta2) * g^2
p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
Source: Kingma & Ba 2015, algorithm 1, in the order of torch.optim.Adam; no weight decay, no amsgrad.
Least work per element, in float32: read p, m, v and g, write p, m and v: 28 bytes, about 14 operations, so that memory
binds. A 16-bit copy of p for the next forward pass costs 2 bytes more here, 6 in a pass of its own.

t and what depends on it alone lie on the device: a captured CUDA graph counts on, where a step passed as a number would
freeze the bias correction. What depends on t is computed in float64, and only then rounded: 1 - beta2^t is 0.001 at
first, of which float32's powers would leave four digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from forgedit_kernels.adam_triton import BLOCK, COPIES, GRADIENTS, TILES, WARPS, adam_kernel, tl_dtype
from forgedit_kernels.dispatch import choose, native_module, native_obstacle, triton_obstacle
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


@torch.no_grad()
def adam_reference(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[Tensor],
    squares: Sequence[Tensor],
    copies: Sequence[Tensor] | None,
    scales: Tensor,
    betas: tuple[float, float],
    eps: float,
    least: float = 0.0,
) -> None:
    """One update in plain torch, in the dtype of `params`, which float64 may be; scales: of Corrections.

    least: the square counts as at least this much of the moment's square
    In float32 on the CPU it equals torch.optim.Adam bit for bit.
    """
    root = scales[0]
    for p, g, m, v, size in zip(params, gradients, moments, squares, scales[1:], strict=True):
        g = g.to(p.dtype)
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        square = torch.maximum(v, least * m * m) if least > 0 else v
        p.sub_(size.to(p.dtype) * m / (square.sqrt() / root.to(p.dtype) + eps))
    if copies is not None:
        for copy, p in zip(copies, params, strict=True):
            copy.copy_(p)


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


def settings(betas: tuple[float, float], eps: float) -> dict[str, float]:
    """The kernels' numbers: differences are taken in float64, then rounded."""
    return {"new1": 1 - betas[0], "keep2": betas[1], "new2": 1 - betas[1], "eps": eps}


class AdamPlan:
    """Adam over given tensors, checked and listed once, then run step by step.

    It holds the tensors, and goes stale where one of them is given other storage. One step is `run`; or `advance`, then
    `apply` for each tensor whose gradient is there, so that it may be freed before the next is made.

    moments, squares: m and v, like the params; corrections: the step count, on the device; backend: the chosen one
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        gradients: Iterable[Tensor] | None = None,
        *,
        lr: float | Sequence[float],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        copies: Iterable[Tensor] | None = None,
        backend: str = "auto",
        num_threads: int | None = None,
    ) -> None:
        """params: masters, all of one dtype and device, each contiguous or channels_last; float32, for the reference
            float64 too
        gradients: laid out like the params, all float32, all bfloat16 or all of the params' dtype; None if they come
            one by one, by `apply`
        lr: of all params, or one of each; eps: with a loss scaled by s, gradients too are s times larger, so that this
            eps does what eps / s does without
        copies: all bfloat16 or all float16, laid out like the params; each step writes p there, rounded once
        num_threads: of the native backend; None takes torch.get_num_threads(). The result does not depend on it
        Raises: ValueError for arguments; RuntimeError if a named backend cannot run
        """
        self.params = list(params)
        self.gradients = None if gradients is None else list(gradients)
        self.copies = None if copies is None else list(copies)
        rates = [float(lr)] * len(self.params) if isinstance(lr, (int, float)) else list(lr)
        check_tensors(self.params, self.gradients, self.copies)
        check_settings(len(self.params), rates, betas, eps, num_threads)
        self.betas, self.eps, self._num_threads = betas, eps, num_threads
        p = self.params[0] if self.params else torch.empty(0)
        copy_dtype = self.copies[0].dtype if self.copies else None
        obstacles = {
            "triton": lambda: triton_obstacle(p.device, p.dtype, (torch.float32,)),
            "native": lambda: native_obstacle(p.device, p.dtype, (torch.float32,)),
        }
        self.backend = choose("adam", backend, obstacles, preferred("adam", p.device, shape_key(copy_dtype)))
        self.moments = [torch.zeros_like(w, memory_format=torch.preserve_format) for w in self.params]
        self.squares = [torch.zeros_like(w, memory_format=torch.preserve_format) for w in self.params]
        self.corrections = Corrections(rates, betas, p.device)
        self._counts = [w.numel() for w in self.params]
        table = work_table((self.params, self.gradients, self.moments, self.squares, self.copies), self._counts)
        if self.backend == "triton":
            self._align = alignment(table[:, :-1].flatten().tolist())
            blocks, self._starts = work_blocks(self._counts, BLOCK * TILES)
            self._work = table.to(p.device), blocks.to(p.device)
        if self.backend == "native":
            self._rows = table.tolist()

    def reset(self) -> None:
        """As new: step 0, moments zero. The params stay."""
        self.corrections.reset()
        for state in (*self.moments, *self.squares):
            state.zero_()

    def advance(self) -> None:
        """Begin a step: count it."""
        self.corrections.advance()

    def run(self) -> None:
        """One step of all tensors. Raises: ValueError if the plan has no gradients"""
        if self.gradients is None:
            raise ValueError("this plan was made without gradients; give it some, or take advance() and apply()")
        self.advance()
        self._update(slice(None), self.gradients, 0)

    def apply(self, index: int, gradient: Tensor) -> None:
        """Within a step, update params[index] by this gradient. Raises: ValueError for a gradient unlike it"""
        check_tensors([self.params[index]], [gradient], None)
        self._update(slice(index, index + 1), [gradient], gradient.data_ptr())

    def _update(self, chosen: slice, gradients: list[Tensor], address: int) -> None:
        """address: of the only gradient, or 0 for those the plan was made with"""
        params, copies = self.params[chosen], None if self.copies is None else self.copies[chosen]
        if not params:
            return
        if self.backend == "triton":
            self._update_triton(chosen, gradients[0].dtype, address)
        elif self.backend == "native":
            self._update_native(chosen, gradients[0].dtype, address)
        else:
            scales = self.corrections.scales
            scales = torch.cat((scales[:1], scales[1:][chosen]))
            states = self.moments[chosen], self.squares[chosen]
            adam_reference(params, gradients, *states, copies, scales, self.betas, self.eps)
            return
        torch.autograd.graph.increment_version([*params, *(copies or ())])  # written behind autograd's back

    def _update_triton(self, chosen: slice, gradient_dtype: torch.dtype, address: int) -> None:
        table, blocks = self._work
        first, *_, last = self._starts[chosen.start : None if chosen.stop is None else chosen.stop + 1]
        with torch.cuda.device_of(table):
            if last > first:
                adam_kernel[(last - first,)](
                    table,
                    blocks,
                    self.corrections.scales,
                    address,
                    first,
                    **settings(self.betas, self.eps),
                    GRADIENT=tl_dtype(gradient_dtype),
                    COPY=tl_dtype(self.copies[0].dtype if self.copies else None),
                    ALIGN=min(self._align, alignment([address])),
                    BLOCK=BLOCK,
                    TILES=TILES,
                    num_warps=WARPS,
                )

    def _update_native(self, chosen: slice, gradient_dtype: torch.dtype, address: int, instructions: str = "") -> None:
        """instructions: one of the module's instruction_sets(); '' takes the widest"""
        native = native_module()
        assert native is not None, "dispatch chose an absent module"
        root, *sizes = self.corrections.scales.tolist()
        native.adam(
            [[row[0], address or row[1], *row[2:]] for row in self._rows[chosen]],
            sizes[chosen],
            root=root,
            **settings(self.betas, self.eps),
            gradient=str(gradient_dtype)[6:],
            copy=str(self.copies[0].dtype)[6:] if self.copies else "",
            threads=self._num_threads or torch.get_num_threads(),
            instruction_set=instructions or native.instruction_sets()[-1],
        )


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


def check_settings(
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


def shape_key(copy_dtype: torch.dtype | None) -> str:
    """The measured table's key of an update."""
    return f"float32 to {str(copy_dtype)[6:]}" if copy_dtype else "float32"
