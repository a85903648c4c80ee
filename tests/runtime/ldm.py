"""Stable Diffusion's original (CompVis) names: the parts of a pipeline as one checkpoint's tensors.

The way back from what forgedit.model.single_file reads, written from the original modules' numbering.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.": "attn.",
}


def _replaced(name: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def _unet_places(config) -> Iterator[tuple[str, str]]:
    """diffusers' prefix and the original one: every layer of the encoder and decoder has a running number there."""
    yield from (("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."))
    yield from (("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."))
    yield from (("mid_block.resnets.0.", "middle_block.0."), ("mid_block.resnets.1.", "middle_block.2."))
    yield "mid_block.attentions.0.", "middle_block.1."
    number, levels = 1, len(config.block_out_channels)
    for level in range(levels):
        for layer in range(config.layers_per_block):
            yield f"down_blocks.{level}.resnets.{layer}.", f"input_blocks.{number}.0."
            yield f"down_blocks.{level}.attentions.{layer}.", f"input_blocks.{number}.1."
            number += 1
        yield f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{number}.0.op."
        number += 1
    number = 0
    for level, kind in enumerate(config.up_block_types):
        for layer in range(config.layers_per_block + 1):
            yield f"up_blocks.{level}.resnets.{layer}.", f"output_blocks.{number}.0."
            yield f"up_blocks.{level}.attentions.{layer}.", f"output_blocks.{number}.1."
            number += 1
        yield f"up_blocks.{level}.upsamplers.0.conv.", f"output_blocks.{number - 1}.{1 + ('Cross' in kind)}.conv."


def unet_tensors(unet) -> dict[str, Tensor]:
    places = dict(_unet_places(unet.config))
    tensors = {}
    for name, weight in unet.state_dict().items():
        prefix = next(prefix for prefix in places if name.startswith(prefix))
        rest = name.removeprefix(prefix)
        rest = _replaced(rest, RESNET) if "resnets" in prefix else rest
        tensors["model.diffusion_model." + places[prefix] + rest] = weight
    return tensors


def vae_tensors(vae) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    words = {f"decoder.up_blocks.{level}.": f"decoder.up.{levels - 1 - level}." for level in range(levels)}
    words |= {"down_blocks.": "down.", "mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2."}
    words |= {"resnets.": "block.", "mid_block.attentions.0.": "mid.attn_1.", "conv_norm_out.": "norm_out."}
    words |= {"downsamplers.0.": "downsample.", "upsamplers.0.": "upsample.", "conv_shortcut.": "nin_shortcut."}
    tensors = {}
    for name, weight in vae.state_dict().items():
        renamed = _replaced(name, words)
        if ".attn_1." in renamed:
            renamed = _replaced(renamed, ATTENTION)
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight  # 1 by 1 convolutions there
        tensors["first_stage_model." + renamed] = weight
    return tensors


def clip_tensors(text_encoder) -> dict[str, Tensor]:
    """As 1.x has it: transformers' names, and a buffer of positions that newer versions do not save."""
    prefix = "cond_stage_model.transformer.text_model."
    positions = torch.arange(text_encoder.config.max_position_embeddings)[None]
    tensors = {prefix + name: weight for name, weight in text_encoder.state_dict().items()}
    return tensors | {prefix + "embeddings.position_ids": positions}


def open_clip_tensors(text_encoder) -> dict[str, Tensor]:
    """As 2.x has it: query, key and value in one, one layer more than is used, a projection and a scale."""
    state, width = dict(text_encoder.state_dict()), text_encoder.config.hidden_size
    tensors: dict[str, Tensor] = {}
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        tensors[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    tensors |= state
    tensors = {_replaced(name, OPEN_CLIP): weight for name, weight in tensors.items()}
    layers = text_encoder.config.num_hidden_layers
    last, unused = f"resblocks.{layers - 1}.", f"resblocks.{layers}."
    tensors |= {name.replace(last, unused): weight + 1 for name, weight in tensors.items() if last in name}
    device = next(iter(state.values())).device
    tensors |= {
        "text_projection": torch.ones(width, width, device=device),
        "logit_scale": torch.ones((), device=device),
    }
    return {"cond_stage_model.model." + name: weight for name, weight in tensors.items()}


def checkpoint(unet, vae, text_encoder, *, generation: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of Stable Diffusion 1 or 2, contiguous."""
    text = clip_tensors(text_encoder) if generation == 1 else open_clip_tensors(text_encoder)
    tensors = unet_tensors(unet) | vae_tensors(vae) | text
    return {name: weight.contiguous() for name, weight in tensors.items()}
