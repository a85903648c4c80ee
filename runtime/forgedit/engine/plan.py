"""How many edits are sampled together, and how they are decoded: the memory needed, from the architecture, before
anything runs.

Activations are counted in elements at the worst moment of a forward pass, as diffusers' modules hold them: a UNet holds
its skip connections, the map that a block was given, and what the layer at work holds. The fused engine holds less.

- On the way up every level holds more than on the way down, as its skip connections are complete and it joins them. So
  only the middle and the way up are looked at.
- A ResNet block holds its input, and beside it two maps like it (normed, activated). Its end, see engine.vae_plan,
  weighs less in a UNet.
- A transformer holds 21 maps of its width while it multiplies by its gate: the map given, its tokens, the sum after the
  attentions, the last attention's output, the normed tokens, the doubled hidden layer (8), the gate's GELU (4), and the
  product (4). Attention itself holds less, as no backend in use keeps its scores.

Not counted: the CUDA context and the workspaces of libraries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from forgedit.engine.vae_plan import VAECost, choose_rows

CPU_EDITS = 8  # together, where no budget is set: more gain little on a CPU, and make the first picture wait
MOST_EDITS = 64  # together, whatever the budget

_TRANSFORMER = 21  # maps of its width, see above

# Latents in float32 for one edit: themselves, a copy, and two answers that a multistep sampler remembers
_LATENTS = 4

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{infix}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for infix, base in (("", 1000), ("i", 1024))
}


@dataclass(frozen=True)
class SamplingPlan:
    """What sampling is predicted to take, all in bytes but the batch.

    batch: edits sampled together
    weights: what lies there already; latents: with the UNet's input, its answer and the embeddings
    activations: of the UNet; prompts: cached keys and values of the cross-attentions; decode: of the VAE
    decode_rows: of a band, if pictures are decoded in bands, and then one by one; None for whole
    """

    batch: int
    weights: int
    latents: int
    activations: int
    prompts: int
    decode: int
    decode_rows: int | None = None

    @property
    def peak(self) -> int:
        """Their sum: what a captured graph used stays reserved while pictures are decoded."""
        return self.weights + self.latents + self.activations + self.prompts + self.decode


def plan_sampling(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    height: int,
    width: int,
    *,
    itemsize: int,
    weights: int,
    budget: int | None,
    tokens: int = 77,
    guided: bool = True,
    decode_batch: int = 1,
    most: int = MOST_EDITS,
    copies: bool = False,
) -> SamplingPlan:
    """The largest batch of edits whose predicted peak fits the budget; decoded whole if that fits with one edit.

    unet, vae: diffusers' configurations of a Stable Diffusion 1.x or 2.x
    height, width: of the latents; itemsize: bytes an element of the UNet's and VAE's dtype
    weights: bytes that lie there whatever the batch: all weights, and on a GPU anything else
        (torch.cuda.memory_allocated())
    budget: bytes in all, see parse_bytes and device_budget; None takes CPU_EDITS
    tokens: of a prompt; guided: two rows of the UNet's batch an edit, else one
    decode_batch: pictures decoded together, at most; most: edits together, at most
    copies: the VAE's convolutions copy, see VAECost
    Raises: RuntimeError if not even one edit fits
    """
    rows = 2 if guided else 1
    decoding = partial(VAECost(vae, itemsize, copies).decode, height, width)
    area = unet["in_channels"] * height * width
    embeddings = tokens * unet["cross_attention_dim"]
    one = SamplingPlan(
        batch=1,
        weights=weights,
        latents=_LATENTS * 4 * area + itemsize * rows * (2 * area + embeddings),
        activations=itemsize * rows * unet_activations(unet, height, width),
        prompts=itemsize * rows * tokens * prompt_channels(unet),
        decode=decoding(None),
    )
    if budget is None:
        return _times(one, min(CPU_EDITS, most), decode_batch)
    picture = height << (len(vae["block_out_channels"]) - 1)
    decode_rows, needed = choose_rows(decoding, picture, budget - (one.peak - one.decode))
    one = replace(one, decode=needed, decode_rows=decode_rows)
    if one.peak > budget:
        parts = ("weights", "latents", "activations", "prompts", "decode")
        shares = ", ".join(f"{name} {show_bytes(getattr(one, name))}" for name in parts)
        raise RuntimeError(
            f"one edit of {height} by {width} latents needs {show_bytes(one.peak)} ({shares}), the budget is "
            f"{show_bytes(budget)}; give more memory, or take a smaller picture or half precision"
        )
    fitting = (_times(one, batch, decode_batch) for batch in range(most, 0, -1))
    return next(plan for plan in fitting if plan.peak <= budget)


def _times(one: SamplingPlan, batch: int, decode_batch: int) -> SamplingPlan:
    return replace(
        one,
        batch=batch,
        latents=batch * one.latents,
        activations=batch * one.activations,
        prompts=batch * one.prompts,
        decode=one.decode * (min(batch, decode_batch) if one.decode_rows is None else 1),
    )


def unet_activations(config: Mapping[str, Any], height: int, width: int) -> int:
    """Elements that one row's forward pass holds at its worst moment, without its input, the prompt, and what is made
    of the prompt, which is cached.

    config: of a UNet2DConditionModel with a middle block that attends; height, width: of the latents
    """
    channels = config["block_out_channels"]
    levels = range(len(channels))
    layers = _each(config["layers_per_block"], len(channels))
    pixels = _pixels(height, width, len(channels))
    time = 10 * channels[0]  # sines, their embedding (4 times as wide), and that again while a block projects it
    skips = [channels[0] * pixels[0]]
    for level in levels:
        skips += [channels[level] * pixels[level]] * layers[level]
        skips += [channels[level] * area for area in pixels[level + 1 : level + 2]]
    before, given = channels[-1], channels[-1] * pixels[-1]
    moments = [sum(skips) + _TRANSFORMER * given]
    for level, kind in zip(reversed(levels), config["up_block_types"], strict=True):
        c, area = channels[level], pixels[level]
        held = sum(skips) + given  # a block's own skip connections are let go when it ends
        for _ in range(layers[level] + 1):
            joined = before + skips.pop() // area
            moments.append(held + area * max(3 * joined, ("CrossAttn" in kind) * _TRANSFORMER * c))
            before = c
        given = c * pixels[max(level - 1, 0)]
    return time + max(moments)


def prompt_channels(config: Mapping[str, Any]) -> int:
    """Channels of all cached keys and values of one token: two for each channel of each cross-attention."""
    channels = config["block_out_channels"]
    layers = _each(config["layers_per_block"], len(channels))
    down = sum(
        c * count
        for c, count, name in zip(channels, layers, config["down_block_types"], strict=True)
        if "CrossAttn" in name
    )
    up = sum(
        c * (count + 1)
        for c, count, name in zip(channels[::-1], layers[::-1], config["up_block_types"], strict=True)
        if "CrossAttn" in name
    )
    return 2 * (down + channels[-1] + up)


def _pixels(height: int, width: int, levels: int) -> list[int]:
    sides = [(height, width)]
    for _ in range(levels - 1):
        sides.append(((sides[-1][0] + 1) // 2, (sides[-1][1] + 1) // 2))
    return [h * w for h, w in sides]


def _each(value: int | Sequence[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def device_budget(device: torch.device) -> int | None:
    """Bytes this process can have on a CUDA device, what it holds included; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def parse_bytes(text: str) -> int:
    """'8GB' as bytes. kB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB powers of 1024; in either case, 'B' or no
    unit is bytes. A fraction of a byte is dropped.

    Raises: ValueError for anything else, or less than one byte
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(
            f"cannot read {text!r} as an amount of memory; expected a number and a unit: kB, MB, GB, TB (powers of "
            "1000) or KiB, MiB, GiB, TiB (powers of 1024), such as 8GB"
        )
    amount = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    if amount < 1:
        raise ValueError(f"{text!r} is less than one byte; expected an amount of memory such as 8GB")
    return amount


def show_bytes(amount: int) -> str:
    """Bytes for a reader, in GB or MB."""
    return f"{amount / 1e9:.2f} GB" if amount >= 1e9 else f"{amount / 1e6:.2f} MB"
