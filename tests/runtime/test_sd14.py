"""Stable Diffusion 1.4's exact UNet, on the meta device: what is trained and what each strategy resets."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from forgedit.config import parse_strategy
from forgedit.stages.tune import trainable_names

CONFIG = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    center_input_sample=False,
    flip_sin_to_cos=True,
    freq_shift=0,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    downsample_padding=1,
    mid_block_scale_factor=1,
    act_fn="silu",
    norm_num_groups=32,
    norm_eps=1e-5,
    cross_attention_dim=768,
    attention_head_dim=8,
)

# METHOD's table: percent of the tuned weights reset
SHARES = {
    "none": 0.0,
    "encoderkv": 39.7,
    "noencoder": 40.7,
    "encoderattn": 35.5,
    "encoderattn+encoder1": 30.4,
    "decoderkv": 57.6,
    "nodecoder": 59.3,
    "decoderattn": 51.0,
    "decoderattn+decoder2": 40.6,
}


@pytest.fixture(scope="module")
def sizes():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIG)
    return {name: weight.numel() for name, weight in unet.named_parameters()}


def test_parameter_counts(sizes):
    assert sum(sizes.values()) == 859_520_964
    trained = trainable_names(sizes, "official")
    assert len(trained) == 518
    assert sum(sizes[name] for name in trained) == 587_642_560
    encoder = sum(sizes[name] for name in trained if name.startswith("down_blocks."))
    decoder = sum(sizes[name] for name in trained if name.startswith("up_blocks."))
    assert round(encoder / 1e6, 1) == 239.1 and round(decoder / 1e6, 1) == 348.6


@pytest.mark.parametrize("strategy", SHARES)
def test_share_of_the_tuned_weights_reset(sizes, strategy):
    trained, matches = trainable_names(sizes, "official"), parse_strategy(strategy)
    total = sum(sizes[name] for name in trained)
    assert round(100 * sum(sizes[name] for name in trained if matches(name)) / total, 1) == SHARES[strategy]


def test_other_profiles(sizes):
    blocks = {name.rsplit(".")[0] + "." + name.split(".")[1] for name in trainable_names(sizes, "paper")}
    assert blocks == {f"down_blocks.{i}" for i in (0, 1, 2)} | {f"up_blocks.{i}" for i in (1, 2, 3)}
    assert trainable_names(sizes, "dreambooth") == tuple(sizes)
    with pytest.raises(ValueError, match="unknown profile 'offical'; expected one of: official, paper, dreambooth"):
        trainable_names(sizes, "offical")
