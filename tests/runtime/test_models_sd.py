"""Stable Diffusion 1.4 and 2.1 in their exact configurations, as their folders were published: all but the values."""

import json
import shutil
import struct
from math import prod

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from forgedit.config import parse_strategy
from forgedit.model import load_model, single_file
from forgedit.stages.tune import trainable_names
from tests.runtime import ldm
from tests.runtime.test_models import SD14_SCHEDULER, SD21_SCHEDULER
from tests.runtime.test_sd14 import CONFIG as SD14_UNET

SD21_UNET = SD14_UNET | dict(
    sample_size=96,
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    upcast_attention=True,
    only_cross_attention=False,
    dual_cross_attention=False,
    num_class_embeds=None,
)
SD14_VAE = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    act_fn="silu",
    latent_channels=4,
    norm_num_groups=32,
    sample_size=512,
)
SD14_TEXT = dict(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    projection_dim=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    attention_dropout=0.0,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
SD21_TEXT = SD14_TEXT | dict(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=512,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)
PUBLISHED = {  # generation -> configurations of the parts
    1: dict(unet=SD14_UNET, vae=SD14_VAE, text_encoder=SD14_TEXT, scheduler=SD14_SCHEDULER),
    2: dict(unet=SD21_UNET, vae=SD14_VAE | dict(sample_size=768), text_encoder=SD21_TEXT, scheduler=SD21_SCHEDULER),
}
SIZES = {  # generation -> part -> parameters
    1: dict(unet=859_520_964, vae=83_653_863, text_encoder=123_060_480),
    2: dict(unet=865_910_724, vae=83_653_863, text_encoder=340_387_840),
}


def build(part, config):
    """A part on the meta device: shapes without memory."""
    with torch.device("meta"):
        if part == "text_encoder":
            return CLIPTextModel(CLIPTextConfig(**config))
        return (UNet2DConditionModel if part == "unet" else AutoencoderKL)(**config)


@pytest.fixture(scope="module")
def published():
    return {
        generation: {part: build(part, PUBLISHED[generation][part]) for part in SIZES[generation]}
        for generation in SIZES
    }


def shapes(module):
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


@pytest.mark.parametrize("generation", [1, 2])
def test_sizes(published, generation):
    for part, size in SIZES[generation].items():
        assert sum(weight.numel() for weight in published[generation][part].parameters()) == size
    assert len(shapes(published[generation]["unet"])) == 686


@pytest.mark.parametrize("generation", [1, 2])
def test_what_is_trained(published, generation):
    """One list of names for both: the profiles and strategies mean the same in 2.1."""
    names = trainable_names([name for name, _ in published[generation]["unet"].named_parameters()], "official")
    assert len(names) == 518
    assert names == trainable_names([name for name, _ in published[1]["unet"].named_parameters()], "official")
    assert sum(map(parse_strategy("encoderkv"), names)) == sum(map(parse_strategy("noencoder"), names)) - 8


@pytest.mark.parametrize("generation", [1, 2])
def test_single_files_are_read_as_the_published_folders(published, generation):
    """Full size, on the meta device: every name and shape of the original checkpoint finds its place."""
    parts = published[generation]
    tensors = ldm.checkpoint(*parts.values(), generation=generation)
    assert tensors[single_file.UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"].shape[1] == (
        768 if generation == 1 else 1024
    )
    assert tensors[single_file.UNET + "output_blocks.11.0.skip_connection.weight"].shape == (320, 640, 1, 1)
    assert (single_file.OPEN_CLIP + "transformer.resblocks.23.attn.in_proj_weight" in tensors) == (generation == 2)
    architecture = single_file.recognise(set(tensors), "file")
    assert architecture is single_file.ARCHITECTURES[generation - 1]
    for part, module in zip(parts, single_file.convert(architecture, set(tensors), tensors.__getitem__), strict=True):
        assert shapes(module) == shapes(parts[part])


# what differs from the published folders without a trace in what is computed: the size comes from the prediction type,
# float32 needs no upcasting, and the ids only matter to a pooled embedding
IMMATERIAL = {"sample_size", "upcast_attention", "bos_token_id", "eos_token_id", "pad_token_id"}


@pytest.mark.parametrize("generation", [1, 2])
def test_single_files_have_the_published_configurations(published, generation):
    architecture = single_file.ARCHITECTURES[generation - 1]
    for part in SIZES[generation]:
        ours = build(part, getattr(architecture, part)).config
        theirs = published[generation][part].config
        differing = {name for name in PUBLISHED[generation][part] if getattr(ours, name) != getattr(theirs, name)}
        assert differing <= IMMATERIAL


def write_zeros(path, tensors):
    """A safetensors file of float16 zeros in these shapes: a header and a hole, so gigabytes cost no disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = prod(tensor.shape) * 2
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def save(folder, parts, configs):
    for part, module in parts.items():
        (folder / part).mkdir(parents=True)
        kind = {"_class_name": type(module).__name__} if part != "text_encoder" else {"model_type": "clip_text_model"}
        (folder / part / "config.json").write_text(json.dumps(configs[part] | kind))
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write_zeros(folder / part / f"{name}.safetensors", module.state_dict())
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(configs["scheduler"]))


@pytest.mark.slow
@pytest.mark.parametrize("generation", [1, 2])
def test_full_size(published, folder, tmp_path, generation):
    """A whole folder loaded from disk, and one forward pass of its UNet on latents of 8 by 8."""
    parts = published[generation]
    save(tmp_path, parts, PUBLISHED[generation])
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    model = load_model(tmp_path)
    expected = ("epsilon", 512, 8) if generation == 1 else ("v_prediction", 768, 8)
    assert (model.prediction_type, model.resolution, model.vae_scale) == expected
    for part, module in parts.items():
        loaded = getattr(model, part)
        assert shapes(loaded) == shapes(module)
        assert {(weight.dtype, weight.device.type) for weight in loaded.parameters()} == {(torch.float32, "cpu")}
    with torch.no_grad():
        for weight in model.unet.parameters():  # random values would take longer than the pass itself
            weight.fill_(1.0 if weight.ndim == 1 else 1e-4)
        prompt = torch.linspace(-1, 1, 77 * model.text_encoder.config.hidden_size).reshape(1, 77, -1)
        prediction = model.unet(torch.ones(1, 4, 8, 8), 500, prompt, return_dict=False)[0]
    assert prediction.shape == (1, 4, 8, 8) and prediction.dtype == torch.float32
    assert prediction.isfinite().all() and prediction.abs().max() > 0
