"""The parts of a loaded StableDiffusionPipeline as a model of our own, in the pipe's own memory.

The modules are new ones, built from the pipe's configurations; only tensors are shared, and they are read, never
written. So nothing that is done here shows in the pipe, and nothing that is done to the pipe's modules (moving them,
hooks, other attention processors, train mode, another dtype) shows here.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.nn import Parameter
from transformers import BlipForConditionalGeneration, CLIPTextModel

from forgedit.config import Defaults
from forgedit.errors import ModelError
from forgedit.model.folder import noise_schedule
from forgedit.model.load import Model, check_parts, vae_scale

log = logging.getLogger("forgedit")


def model_from_pipe(pipe: Any, captioner: Any = None, processor: Any = None) -> Model:
    """The pipe's UNet, VAE, text encoder, tokenizer and noise schedule, on the UNet's device.

    captioner, processor: BlipForConditionalGeneration and its processor, as a pipe has none; both or neither
    A tensor that is float32, contiguous and on that device already is shared; of any other we hold a float32 copy. So
    the pipe's weights must not be written in place (trained, fused with a LoRA) while the model lives.
    Raises: ModelError for another kind of pipe, or weights that are offloaded, quantised, compiled, or not the
        configuration's own, such as a LoRA's; ValueError for a captioner without a processor, or the reverse
    """
    if (captioner is None) != (processor is None):
        raise ValueError("captioner and processor go together; give both, or neither and TuneConfig.caption")
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for name in (*kinds, "tokenizer", "scheduler"):
        if getattr(pipe, name, None) is None:
            raise ModelError(f"{type(pipe).__name__} has no {name}; expected a loaded StableDiffusionPipeline")
    for name, kind in kinds.items():
        _check_kind(getattr(pipe, name), kind, f"pipe's {name}")
    device = next(pipe.unet.parameters()).device
    unet, vae, text_encoder = (_share(getattr(pipe, name), kinds[name], f"pipe's {name}", device) for name in kinds)
    tokenizer = copy.deepcopy(pipe.tokenizer)  # calls leave their padding and truncation in it
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    alphas_cumprod, prediction_type = noise_schedule(pipe.scheduler.config)
    if captioner is not None:
        _check_kind(captioner, BlipForConditionalGeneration, "captioner")
        captioner = _share(captioner, BlipForConditionalGeneration, "captioner", device)
    model = Model(
        name=getattr(pipe, "name_or_path", None) or "pipe",
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        captioner=captioner,
        processor=copy.deepcopy(processor),
        alphas_cumprod=alphas_cumprod.to(device),
        prediction_type=prediction_type,
        resolution=unet.config.sample_size * vae_scale(vae),
        vae_scale=vae_scale(vae),
        defaults=Defaults.merged({}),
    )
    check_parts(model)
    return model


def _check_kind(module: Any, kind: Any, name: str) -> None:
    if type(module) is not kind:
        raise ModelError(
            f"the {name} is a {type(module).__name__}; expected a {kind.__name__}, not compiled, not wrapped"
        )


def _share(module: Any, kind: Any, name: str, device: torch.device) -> Any:
    """A frozen module in eval mode of the same configuration, holding `module`'s tensors, or float32 copies of them."""
    config = copy.deepcopy(module.config)  # transformers writes to the one it is given
    with torch.device("meta"):  # no memory, no random numbers
        own = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    theirs, ours = _tensors(module), _tensors(own)
    weights = dict(own.named_parameters(remove_duplicate=False))
    for names, wrong in ((theirs.keys() - ours.keys(), "more"), (ours.keys() - theirs.keys(), "fewer")):
        if names:
            raise ModelError(
                f"the {name} has {len(names)} tensors {wrong} than its configuration says, such as {min(names)!r}; "
                "fuse and unload LoRAs and adapters first"
            )
    made: dict[int, Tensor] = {}  # tied weights stay one
    copied = 0
    for path, tensor in theirs.items():
        if tensor.is_meta:
            raise ModelError(f"the {name}'s weights are offloaded; load the pipe without device_map or offloading")
        if tensor.shape != ours[path].shape or tensor.is_floating_point() != ours[path].is_floating_point():
            raise ModelError(f"the {name}'s {path!r} is {tensor.dtype} {list(tensor.shape)}; load it not quantised")
        if id(tensor) not in made:
            # .data, not detach(): what is written to our modules later must not count as a write to the pipe's tensor
            value = tensor.data.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
            if value.stride() != ours[path].stride():  # is_contiguous() takes a channels_last 1x1 kernel for contiguous
                value = value.clone(memory_format=torch.contiguous_format)
            made[id(tensor)] = value
            copied += value.nbytes * (value.data_ptr() != tensor.data_ptr())
        value = made[id(tensor)]
        place, _, leaf = path.rpartition(".")
        setattr(own.get_submodule(place), leaf, Parameter(value, False) if path in weights else value)
    if copied:
        log.info("the %s is not float32, contiguous and on %s: %d bytes of it are copied", name, device, copied)
    return own.requires_grad_(False).eval()


def _tensors(module: Any) -> dict[str, Tensor]:
    """Parameters and buffers, those that no file holds and tied ones under each of their names among them."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
