"""Adam with its moments in 8 bits, in bitsandbytes' format: 2 bytes of state per parameter and 8 per 256, not 8 each.

A block of 256 elements keeps its largest magnitude in float32, and for each element the code of the nearest value in a
map of 256. Decade i of the map, 10^(i-7) to 10^(i-6) for i = 0 … 6, is cut into 2^i equal cells (m, with a sign) or
2^(i+1) (v), whose middles are its values; 0 and 1 are added.
Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", sections 2.1 and 2.2; Adam: see adam.py.
Least work per element, in float32: read p, g and two codes, write p and two codes: 16 bytes.

A magnitude's place among the codes is continuous and concave in it, with one line per decade, so it is the least of
seven lines: no search. Values lie in the middle of cells, so that rounding down is nearest, but between two decades,
where the border is 0.2 of a cell late, and below 1; so 0.3 is added, and one midpoint read to step back where due.
Blocks follow the order in memory: a weight in channels_last has other blocks than bitsandbytes, which makes it
contiguous, gives it. Of tensors under 4096 elements the moments stay in float32.

By Cauchy and Schwarz m^2 <= v (1 - beta1)^2 / ((1 - beta2) (1 - beta1^2 / beta2)) in any run of Adam: a step is at most
some seven times its first. Rounding breaks this where v becomes 0 and m does not, and m / sqrt(v) has no bound when the
next gradient is 0. A bounded plan counts v as at least what m says it must be; bitsandbytes has no such bound.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forgedit_kernels.adam import AdamPlan, adam_reference
from forgedit_kernels.adam8bit_bitsandbytes import adam8bit_bitsandbytes, bitsandbytes_obstacle
from forgedit_kernels.adam8bit_triton import ROWS, TILES, WARPS, adam8bit_kernel
from forgedit_kernels.adam_work import Corrections, Given, Work, check_tensors

BLOCK = 256
LEAST_8BIT = 4096


@dataclass(frozen=True)
class Quantized:
    """codes: uint8 [elements], in the parameter's order in memory; largest: float32 [blocks]. All zeros mean 0."""

    codes: Tensor
    largest: Tensor


@functools.cache
def dynamic_map(signed: bool) -> tuple[Tensor, Tensor]:
    """The values of the 256 codes, ascending; and for the magnitude codes the midpoint below each, 0 for the first.

    Magnitude codes count from 0 at the value 0: up to 255, or signed up to 128. Signed, the code is 127 plus or minus
    the magnitude's; -1 has none.
    """
    values = [torch.zeros(1)]
    for i in range(7):
        borders = torch.linspace(0.1, 1, 2**i * (1 if signed else 2) + 1)
        values.append(10.0 ** (i - 6) * ((borders[1:] + borders[:-1]) / 2))
    magnitudes = torch.cat([*values, torch.ones(1)])
    midpoints = torch.cat((torch.zeros(1), (magnitudes[1:] + magnitudes[:-1]) / 2))
    return torch.cat((-magnitudes[1:-1].flip(0), magnitudes)) if signed else magnitudes, midpoints


def quantize(x: Tensor, signed: bool) -> Quantized:
    """x: flat, any float dtype. Halfway between two values the larger magnitude is taken."""
    midpoints = dynamic_map(signed)[1].to(x.device)
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True).float()
    scaled = blocks / torch.where(largest > 0, largest, 1).to(x.dtype)
    magnitude = scaled.abs().nan_to_num(1).clamp(max=1)
    code = torch.bucketize(magnitude, midpoints[1:].to(x.dtype), right=True)
    if signed:
        code = torch.where(scaled < 0, 127 - code.clamp(max=127), 127 + code)
    return Quantized(code.to(torch.uint8).flatten()[: x.numel()], largest.flatten())


def dequantize(state: Quantized, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that the codes stand for, flat."""
    values = dynamic_map(signed)[0].to(state.codes.device)
    largest = state.largest.repeat_interleave(BLOCK)[: state.codes.numel()]
    return values[state.codes.int()].to(dtype) * largest.to(dtype)


def least_square(betas: tuple[float, float]) -> float:
    """What v is at least, as a share of m^2; 0 where there is no such bound."""
    return max((1 - betas[1]) * (1 - betas[0] ** 2 / betas[1]) / (1 - betas[0]) ** 2, 0.0) if betas[1] else 0.0


@torch.no_grad()
def adam8bit_reference(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Sequence[Quantized],
    squares: Sequence[Quantized],
    copies: Sequence[Tensor] | None,
    scales: Tensor,
    betas: tuple[float, float],
    eps: float,
    least: float = 0.0,
) -> None:
    """One update in plain torch, in the dtype of `params`, which float64 may be; scales: of Corrections.

    least: see least_square; 0 does not bound
    """
    flat_params, flat_gradients = [_flat(p) for p in params], [_flat(g) for g in gradients]
    m = [dequantize(state, True, p.dtype) for state, p in zip(moments, params, strict=True)]
    v = [dequantize(state, False, p.dtype) for state, p in zip(squares, params, strict=True)]
    flat_copies = copies and [_flat(c) for c in copies]
    adam_reference(flat_params, flat_gradients, m, v, flat_copies, scales, betas, eps, least)
    for signed, states, new in ((True, moments, m), (False, squares, v)):
        for state, values in zip(states, new, strict=True):
            quantized = quantize(values, signed)
            state.codes.copy_(quantized.codes)
            state.largest.copy_(quantized.largest)


class Adam8bitPlan:
    """Adam with 8-bit moments over given tensors; used as AdamPlan is, with the same arguments.

    moments, squares: m and v of the `large` params, those of at least 4096 elements; small: the plan of the others
    corrections: the step count of the large ones, on the device; backend: the chosen one
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
        bounded: bool = False,
    ) -> None:
        """bounded: see the top of the file; False steps as bitsandbytes does
        backend: 'bitsandbytes' too, when named, which cannot be bounded, nor captured in a graph
        """
        given = Given.checked(params, gradients, copies, lr, betas, eps, num_threads)
        if backend == "bitsandbytes" and bounded:
            raise ValueError("backend 'bitsandbytes' has no bound; take bounded=False, or another backend")
        more = {backend: bitsandbytes_obstacle} if backend == "bitsandbytes" else {}
        self.backend = given.choose("adam8bit", backend, more)
        self.params, self.gradients, self.copies = given.params, given.gradients, given.copies
        self.betas, self.eps = betas, eps
        small = [index for index, w in enumerate(self.params) if w.numel() < LEAST_8BIT]
        large = [index for index, w in enumerate(self.params) if w.numel() >= LEAST_8BIT]
        self._place = {index: (which is large, place) for which in (small, large) for place, index in enumerate(which)}
        few, self._large = given.part(small), given.part(large)
        self.small = AdamPlan(
            few.params,
            few.gradients,
            lr=few.rates,
            betas=betas,
            eps=eps,
            copies=few.copies,
            backend="auto" if self.backend == "bitsandbytes" else self.backend,
            num_threads=num_threads,
        )
        self.large = self._large.params
        self.moments, self.squares = _zero_states(self.large), _zero_states(self.large)
        self.corrections = Corrections(self._large.rates, betas, given.device)
        self._least = least_square(betas) if bounded else 0.0
        self._maps = [values.to(given.device) for signed in (True, False) for values in dynamic_map(signed)]
        states = [[getattr(state, part) for state in side] for part in ("codes", "largest") for side in self._states()]
        columns = (self.large, self._large.gradients, *states, self._large.copies)
        self._work = Work(self._large, columns, self.corrections, self.backend, TILES * ROWS * BLOCK)

    def _states(self) -> tuple[list[Quantized], list[Quantized]]:
        return self.moments, self.squares

    def reset(self) -> None:
        """As new: step 0, moments zero. The params stay."""
        self.small.reset()
        self.corrections.reset()
        for state in (*self.moments, *self.squares):
            state.codes.zero_()
            state.largest.zero_()

    def advance(self) -> None:
        """Begin a step: count it."""
        self.small.advance()
        self.corrections.advance()

    def run(self) -> None:
        """One step of all tensors. Raises: ValueError if the plan has no gradients"""
        self.small.run()  # counts its own step
        self.corrections.advance()
        assert self._large.gradients is not None, "or small.run() has raised"
        self._update(slice(None), self._large.gradients, 0)

    def apply(self, index: int, gradient: Tensor) -> None:
        """Within a step, update params[index] by this gradient. Raises: ValueError for a gradient unlike it"""
        is_large, place = self._place[index]
        if not is_large:
            self.small.apply(place, gradient)
            return
        check_tensors([self.large[place]], [gradient], None)
        self._update(slice(place, place + 1), [gradient], gradient.data_ptr())

    def _update(self, chosen: slice, gradients: list[Tensor], address: int, instructions: str = "") -> None:
        """address: of the only gradient, or 0 for those the plan was made with; instructions: see Work.call"""
        if not self.large[chosen]:
            return
        dtype = gradients[0].dtype
        if self.backend == "triton":
            sizes = {"ROWS": ROWS, "TILES": TILES, "num_warps": WARPS}
            self._work.launch(adam8bit_kernel, chosen, dtype, address, *self._maps, least=self._least, **sizes)
        elif self.backend == "native":
            maps = [values.data_ptr() for values in self._maps]
            self._work.call("adam8bit", chosen, dtype, address, instructions, maps, least=self._least)
        elif self.backend == "bitsandbytes":
            self._update_bitsandbytes(chosen, gradients)
        else:
            lists = self.large[chosen], gradients, self.moments[chosen], self.squares[chosen]
            copies = None if self._large.copies is None else self._large.copies[chosen]
            scales = self.corrections.scales_of(chosen)
            adam8bit_reference(*lists, copies, scales, self.betas, self.eps, self._least)

    def _update_bitsandbytes(self, chosen: slice, gradients: list[Tensor]) -> None:
        moments, squares = ([(state.codes, state.largest) for state in side[chosen]] for side in self._states())
        m_values, _, v_values, _ = self._maps
        params = self.large[chosen]
        adam8bit_bitsandbytes(
            [_flat(p) for p in params], [_flat(g) for g in gradients], moments, squares, (m_values, v_values),
            self._large.rates[chosen], int(self.corrections.step), self.betas, self.eps,
        )  # fmt: skip
        for copy, p in zip(self._large.copies[chosen] if self._large.copies else (), params, strict=False):
            copy.copy_(p)
        self._work.mark_written(chosen)


def _zero_states(params: Sequence[Tensor]) -> list[Quantized]:
    return [
        Quantized(
            torch.zeros(w.numel(), dtype=torch.uint8, device=w.device),
            torch.zeros(-(-w.numel() // BLOCK), dtype=torch.float32, device=w.device),
        )
        for w in params
    ]


def _flat(w: Tensor) -> Tensor:
    """A view of its elements as they lie in memory."""
    return w.view(-1) if w.is_contiguous() else w.permute(0, 2, 3, 1).reshape(-1)
