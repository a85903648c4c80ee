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

from forgedit_kernels.adam_triton import BLOCK, TILES, WARPS, adam_kernel
from forgedit_kernels.adam_work import Corrections, Given, Work, check_tensors


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
        given = Given.checked(params, gradients, copies, lr, betas, eps, num_threads)
        self.params, self.gradients, self.copies = given.params, given.gradients, given.copies
        self.betas, self.eps = betas, eps
        self.backend = given.choose("adam", backend, {})
        self.moments = [torch.zeros_like(w, memory_format=torch.preserve_format) for w in self.params]
        self.squares = [torch.zeros_like(w, memory_format=torch.preserve_format) for w in self.params]
        self.corrections = Corrections(given.rates, betas, given.device)
        columns = (self.params, self.gradients, self.moments, self.squares, self.copies)
        self._work = Work(given, columns, self.corrections, self.backend, BLOCK * TILES)

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

    def _update(self, chosen: slice, gradients: list[Tensor], address: int, instructions: str = "") -> None:
        """address: of the only gradient, or 0 for those the plan was made with; instructions: see Work.call"""
        if not self.params[chosen]:
            return
        dtype = gradients[0].dtype
        if self.backend == "triton":
            sizes = {"BLOCK": BLOCK, "TILES": TILES, "num_warps": WARPS}
            self._work.launch(adam_kernel, chosen, dtype, address, **sizes)
        elif self.backend == "native":
            self._work.call("adam", chosen, dtype, address, instructions)
        else:
            lists = self.params[chosen], gradients, self.moments[chosen], self.squares[chosen]
            copies = None if self.copies is None else self.copies[chosen]
            adam_reference(*lists, copies, self.corrections.scales_of(chosen), self.betas, self.eps)
