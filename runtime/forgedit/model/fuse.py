"""Stable Diffusion's UNet as the engine runs it: the weights and the arithmetic of diffusers', laid out for speed.

- Feature maps are channels-last throughout, so that [B, C, H, W] and tokens [B, H * W, C] are views of each other.
- Weights multiplied with one input lie side by side: Q, K and V; a prompt's K and V; all blocks' time projections. By
  the UNet's own names they are views of those matrices, so a merge by name writes what the engine reads.
- What does not change from step to step is an argument: a prompt's keys and values, the timesteps' projections.
- Before the first cross-attention the unconditional and the conditional rows are equal, and are computed once.
- The same pass learns: autograd sees what lies side by side as one tensor, whose gradient is every part's.

The diffusers module given is read, never changed, and no class is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, linear, silu
from torch.utils.checkpoint import checkpoint

from forgedit.errors import ModelError
from forgedit_kernels import attention, backend_for, group_norm_silu, linear_residual, norm_geglu, norm_linear

# What the layout takes for granted; a UNet that differs runs on the reference path alone.
EXPECTED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim_type": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
}

FIRST_TIME_PROJECTION = "down_blocks.0.resnets.0.time_emb_proj"  # of a group, which goes by its first one's name

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Leaf:
    """A tensor that autograd sees as one. parts: the weights in it, each with its rows, by the UNet's names."""

    tensor: Tensor
    parts: dict[str, slice]


class FusedUNet:
    """The UNet's forward pass over weights of its own.

    unet: a frozen UNet2DConditionModel of Stable Diffusion 1.x or 2.x
    dtype: of weights and features; backend: of forgedit_kernels, for every op that has it
    device: None takes the unet's
    weights: by the UNet's parameter names, each with that parameter's shape; write to them in place only
    leaves: what they lie in; none requires a gradient unless the caller says so
    checkpointing: whether a backward pass computes each layer's inside anew instead of keeping it
    Raises: ModelError for a UNet of another structure
    """

    def __init__(
        self,
        unet: Any,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        device: torch.device | None = None,
    ) -> None:
        unexpected = {name: unet.config[name] for name in EXPECTED if unet.config[name] != EXPECTED[name]}
        if unexpected:
            raise ModelError(f"the engine does not know a UNet with {unexpected}; use numerics='reference'")
        self.dtype, self.device, self.checkpointing = dtype, device or unet.conv_in.weight.device, False
        self.weights, whole = _lay_out(unet, dtype, self.device)
        joined = [Leaf(whole[names[0]], _rows(self.weights, names)) for names in _side_by_side(unet)]
        alone = self.weights.keys() - {name for leaf in joined for name in leaf.parts}
        self.leaves = joined + [Leaf(w, {n: slice(None)}) for n, w in self.weights.items() if n in alone]
        self._time_frequencies = unet.time_proj  # sines and cosines, no weights
        self._times = [whole[f"{FIRST_TIME_PROJECTION}.{part}"] for part in ("weight", "bias")]
        build = _Build(self.weights, whole, _Ops.on(backend))
        self._down = [build.level(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
        self._middle = build.level("mid_block", unet.mid_block)
        self._up = [build.level(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
        self._norm_out = build.norm("conv_norm_out", unet.conv_norm_out)
        self.prompts = build.prompts  # the matrices that make each cross-attention's keys and values, and its heads

    def leaves_of(self, names: Collection[str]) -> list[Leaf]:
        """The leaves that weights of these names lie in."""
        return [leaf for leaf in self.leaves if not leaf.parts.keys().isdisjoint(names)]

    def project_timesteps(self, timesteps: Tensor) -> Tensor:
        """All blocks' time projections [S, channels of all blocks] for timesteps [S]."""
        w = self.weights
        embedding = linear(
            self._time_frequencies(timesteps).to(self.dtype),
            w["time_embedding.linear_1.weight"],
            w["time_embedding.linear_1.bias"],
        )
        embedding = linear(silu(embedding), w["time_embedding.linear_2.weight"], w["time_embedding.linear_2.bias"])
        return linear(silu(embedding), *self._times)

    def project_prompts(self, embeddings: Tensor) -> list[Tensor]:
        """Keys and values [R, T, 2, heads, head dim] of every cross-attention, in order, for embeddings [R, T, D]."""
        embeddings = embeddings.to(self.dtype)
        return [linear(embeddings, weight).unflatten(-1, (2, heads, -1)) for weight, heads in self.prompts]

    def predict(self, latents: Tensor, timesteps: Tensor, embedding: Tensor) -> Tensor:
        """The answer to rows that have one prompt, whose keys and values are made of one row and broadcast.

        latents: as __call__ takes them; timesteps: [B]; embedding: [1, T, D]
        """
        prompts = [made.expand(len(latents), *made.shape[1:]) for made in self.project_prompts(embedding)]
        return self(latents, self.project_timesteps(timesteps), prompts)

    def __call__(self, latents: Tensor, times: Tensor, prompts: list[Tensor]) -> Tensor:
        """The UNet's answer.

        latents: [B, C, h, w], channels-last, of `dtype`
        times: [1 or B, channels of all blocks], rows of project_timesteps
        prompts: of project_prompts, with R = B rows, or R = 2B, unconditional rows first
        Returns: [R, C, h, w], channels-last
        """
        w, state = self.weights, _State(times, prompts, prompts[0].shape[0], self.checkpointing)
        x = conv2d(latents, w["conv_in.weight"], w["conv_in.bias"], padding=1)
        skips = [x]
        for level in self._down:
            x = level.descend(x, state, skips)
        x = self._middle.cross(x, state)
        for level in self._up:
            x = level.ascend(x, state, skips)
        return conv2d(self._norm_out(x), w["conv_out.weight"], w["conv_out.bias"], padding=1)


@dataclass
class _State:
    """What one call hands down: time projections, prompts, rows after the first cross-attention."""

    times: Tensor
    prompts: list[Tensor]
    rows: int
    checkpointing: bool

    def run(self, layer: Callable[[Tensor, _State], Tensor], x: Tensor) -> Tensor:
        if self.checkpointing:
            out: Tensor = checkpoint(layer, x, self, use_reentrant=False, preserve_rng_state=False)
            return out
        return layer(x, self)

    def repeat(self, features: Tensor) -> Tensor:
        """Features computed once for the guidance rows, [B, ...], for each of them, [R, ...]."""
        times = self.rows // features.shape[0]
        return features if times == 1 else torch.cat([features] * times)  # keeps the layout, as expanding would not


@dataclass(frozen=True)
class _Ops:
    """The kernels, each with its backend."""

    attention: Callable[..., Tensor]
    group_norm_silu: Callable[..., Tensor]
    linear_residual: Callable[..., Tensor]
    norm_geglu: Callable[..., Tensor]
    norm_linear: Callable[..., Tensor]

    @classmethod
    def on(cls, backend: str) -> _Ops:
        ops = (attention, group_norm_silu, linear_residual, norm_geglu, norm_linear)
        return cls(*(partial(op, backend=backend_for(op.__name__, backend)) for op in ops))


class _Build:
    """Makes the layers from diffusers' modules, in the order of the forward pass."""

    def __init__(self, weights: Weights, whole: Mapping[str, Tensor], ops: _Ops) -> None:
        self.weights, self.whole, self.ops = weights, whole, ops
        self.prompts: list[tuple[Tensor, int]] = []
        self._channels = 0  # of the time projections handed out

    def affine(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def norm(self, name: str, module: Any, silu: bool = True) -> Callable[..., Tensor]:
        weight, bias = self.affine(name)
        return partial(
            self.ops.group_norm_silu, weight=weight, bias=bias, groups=module.num_groups, eps=module.eps, silu=silu
        )

    def level(self, name: str, block: Any) -> _Level:
        transformers = list(getattr(block, "attentions", ()))
        resnets = [_Resnet(self, f"{name}.resnets.{i}", module) for i, module in enumerate(block.resnets)]
        attentions = [_Transformer(self, f"{name}.attentions.{i}", module) for i, module in enumerate(transformers)]
        resample = [part for part in ("downsamplers", "upsamplers") if getattr(block, part, None)]
        return _Level(resnets, attentions, self.affine(f"{name}.{resample[0]}.0.conv") if resample else None)

    def time_rows(self, channels: int) -> slice:
        self._channels += channels
        return slice(self._channels - channels, self._channels)


class _Resnet:
    def __init__(self, build: _Build, name: str, module: Any) -> None:
        self.norm1 = build.norm(f"{name}.norm1", module.norm1)
        self.conv1 = build.affine(f"{name}.conv1")
        self.rows = build.time_rows(module.out_channels)
        self.norm2 = build.norm(f"{name}.norm2", module.norm2)
        self.conv2 = build.affine(f"{name}.conv2")
        self.shortcut = build.affine(f"{name}.conv_shortcut") if module.conv_shortcut is not None else None
        self.linear_residual = build.ops.linear_residual

    def __call__(self, x: Tensor, state: _State) -> Tensor:
        hidden = conv2d(self.norm1(x), *self.conv1, padding=1)
        hidden = conv2d(self.norm2(hidden, shift=state.times[:, self.rows]), *self.conv2, padding=1)
        if self.shortcut is None:
            return hidden.add_(x)
        weight, bias = self.shortcut
        return as_feature(self.linear_residual(as_tokens(x), weight.flatten(1), bias, as_tokens(hidden)), hidden)


class _Transformer:
    """GroupNorm, projection in, blocks of self-attention, cross-attention and feed-forward, projection out."""

    def __init__(self, build: _Build, name: str, module: Any) -> None:
        self.norm = build.norm(f"{name}.norm", module.norm, silu=False)
        self.project_in, self.project_out = build.affine(f"{name}.proj_in"), build.affine(f"{name}.proj_out")
        blocks = enumerate(module.transformer_blocks)
        self.blocks = [_TransformerBlock(build, f"{name}.transformer_blocks.{i}", block) for i, block in blocks]
        self.linear_residual = build.ops.linear_residual

    def __call__(self, x: Tensor, state: _State) -> Tensor:
        weight, bias = self.project_in
        tokens = linear(as_tokens(self.norm(x)), weight.flatten(1), bias)
        for block in self.blocks:
            tokens = block(tokens, state)
        weight, bias = self.project_out
        return as_feature(self.linear_residual(tokens, weight.flatten(1), bias, as_tokens(state.repeat(x))), x)


class _TransformerBlock:
    def __init__(self, build: _Build, name: str, module: Any) -> None:
        self.heads = module.attn1.heads
        self.norms = [(*build.affine(f"{name}.norm{i}"), getattr(module, f"norm{i}").eps) for i in (1, 2, 3)]
        self.qkv = build.whole[f"{name}.attn1.to_q.weight"]
        self.query = build.weights[f"{name}.attn2.to_q.weight"]
        self.out = [build.affine(f"{name}.{part}.to_out.0") for part in ("attn1", "attn2")]
        self.widen, self.narrow = build.affine(f"{name}.ff.net.0.proj"), build.affine(f"{name}.ff.net.2")
        self.ops = build.ops
        self.prompt = len(build.prompts)
        build.prompts.append((build.whole[f"{name}.attn2.to_k.weight"], module.attn2.heads))

    def __call__(self, tokens: Tensor, state: _State) -> Tensor:
        ops, heads = self.ops, (self.heads, -1)
        weight, bias, eps = self.norms[0]
        joint = ops.norm_linear(tokens, weight, bias, self.qkv, eps=eps)
        query, key, value = joint.unflatten(-1, (3, *heads)).unbind(2)
        tokens = ops.linear_residual(ops.attention(query, key, value).flatten(2), *self.out[0], tokens)
        tokens = state.repeat(tokens)
        weight, bias, eps = self.norms[1]
        query = ops.norm_linear(tokens, weight, bias, self.query, eps=eps).unflatten(-1, heads)
        key, value = state.prompts[self.prompt].unbind(2)
        tokens = ops.linear_residual(ops.attention(query, key, value).flatten(2), *self.out[1], tokens)
        weight, bias, eps = self.norms[2]
        gated = ops.norm_geglu(tokens, weight, bias, *self.widen, eps=eps)
        return ops.linear_residual(gated, *self.narrow, tokens)


@dataclass(frozen=True)
class _Level:
    """The layers of one down, middle or up block. resample: weight and bias of its strided or enlarging convolution."""

    resnets: list[_Resnet]
    attentions: list[_Transformer]
    resample: tuple[Tensor, Tensor] | None

    def descend(self, x: Tensor, state: _State, skips: list[Tensor]) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = state.run(resnet, x)
            if self.attentions:
                x = state.run(self.attentions[index], x)
            skips.append(x)
        if self.resample is not None:
            x = conv2d(x, *self.resample, stride=2, padding=1)
            skips.append(x)
        return x

    def cross(self, x: Tensor, state: _State) -> Tensor:
        """The middle: a ResNet block, then attention and ResNet block in turn."""
        x = state.run(self.resnets[0], x)
        for transformer, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = state.run(resnet, state.run(transformer, x))
        return x

    def ascend(self, x: Tensor, state: _State, skips: list[Tensor]) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = state.run(resnet, torch.cat([x, state.repeat(skips.pop())], dim=1))
            if self.attentions:
                x = state.run(self.attentions[index], x)
        if self.resample is not None:  # to the size of what comes next, which is odd where the photo's size is
            x = conv2d(interpolate(x, size=skips[-1].shape[-2:], mode="nearest"), *self.resample, padding=1)
        return x


def as_tokens(features: Tensor) -> Tensor:
    """[B, C, H, W] as tokens [B, H * W, C]: a view of channels-last features."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)


def as_feature(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens [B, H * W, C] as channels-last [B, C, H, W], with height and width of `like`; a view."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)


def _side_by_side(unet: Any) -> list[list[str]]:
    """Groups of weights that are multiplied with one input, in the order of the forward pass."""
    groups, resnets = [], []
    for name, _ in unet.named_modules():
        if name.endswith(".attn1"):
            groups.append([f"{name}.{part}.weight" for part in ("to_q", "to_k", "to_v")])
        elif name.endswith(".attn2"):
            groups.append([f"{name}.{part}.weight" for part in ("to_k", "to_v")])
    for block in ("down_blocks", "mid_block", "up_blocks"):
        modules = getattr(unet, block).named_modules()
        resnets += [f"{block}.{name}.time_emb_proj" for name, module in modules if hasattr(module, "time_emb_proj")]
    return [*groups, *([f"{name}.{part}" for name in resnets] for part in ("weight", "bias"))]


def _rows(weights: Weights, names: list[str]) -> dict[str, slice]:
    """Where weights that lie below one another begin and end."""
    ends = list(accumulate(len(weights[name]) for name in names))
    return {name: slice(end - len(weights[name]), end) for name, end in zip(names, ends, strict=True)}


def _lay_out(unet: Any, dtype: torch.dtype, device: torch.device) -> tuple[Weights, dict[str, Tensor]]:
    """Copies of the weights by name, in dtype, and the matrices that hold several, by the first one's name."""
    parameters = {name: weight.detach() for name, weight in unet.named_parameters()}
    weights: Weights = {}
    whole: dict[str, Tensor] = {}
    for names in _side_by_side(unet):
        whole[names[0]] = torch.cat([parameters[name] for name in names]).to(device, dtype)
        parts = whole[names[0]].split([len(parameters[name]) for name in names])
        weights.update(zip(names, parts, strict=True))
    for name, weight in parameters.items():
        if name not in weights:
            pixels = weight.dim() == 4 and weight.shape[-1] > 1  # a 1x1 convolution is a product of tokens
            layout = torch.channels_last if pixels else torch.contiguous_format
            empty = torch.empty_like(weight, dtype=dtype, device=device, memory_format=layout)
            weights[name] = empty.copy_(weight)
    return {name: weights[name] for name in parameters}, whole
