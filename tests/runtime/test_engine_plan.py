"""The memory plan, against a count of what diffusers' modules really hold."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from forgedit.engine.plan import (
    CPU_EDITS,
    MOST_EDITS,
    device_budget,
    parse_bytes,
    plan_sampling,
    prompt_channels,
    show_bytes,
    unet_activations,
)
from forgedit.engine.vae_plan import VAECost
from tests.runtime.live_bytes import measured
from tests.runtime.test_vae_plan import SD_VAE

DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
SD14 = dict(
    in_channels=4,
    down_block_types=DOWN,
    up_block_types=UP,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    cross_attention_dim=768,
    attention_head_dim=8,
)
SD21 = SD14 | dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
BUNDLED = SD14 | dict(
    block_out_channels=(64, 96, 128, 160),
    norm_num_groups=16,
    layers_per_block=1,
    cross_attention_dim=128,
    attention_head_dim=(2, 3, 4, 5),
)
# Where something else than the last transformer takes most: joined maps of a level that does not attend, the middle
PLAIN_TOP = SD14 | dict(
    block_out_channels=(64, 64, 64),
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    layers_per_block=(1, 2, 1),
    cross_attention_dim=32,
)
WIDE_BELOW = PLAIN_TOP | dict(block_out_channels=(16, 256, 256), up_block_types=("UpBlock2D",) * 3)
WIDE_MIDDLE = PLAIN_TOP | dict(
    block_out_channels=(8, 8, 512),
    down_block_types=("DownBlock2D",) * 3,
    up_block_types=("UpBlock2D",) * 3,
    cross_attention_dim=8,
)
UNETS = {
    "sd14": (SD14, 64, 64),
    "sd14-rectangle": (SD14, 40, 100),
    "sd21": (SD21, 96, 96),
    "bundled": (BUNDLED, 16, 16),
    "bundled-odd": (BUNDLED, 27, 35),
    "plain-top": (PLAIN_TOP, 32, 32),
    "wide-below": (WIDE_BELOW, 32, 32),
    "wide-middle": (WIDE_MIDDLE, 32, 32),
    "wide-middle-odd": (WIDE_MIDDLE, 27, 35),
}


def unet_inputs(config, rows, height, width, dtype):
    prompt = torch.zeros(rows, 77, config["cross_attention_dim"], dtype=dtype)
    return torch.zeros(rows, 4, height, width, dtype=dtype), torch.zeros(rows, dtype=torch.int64), prompt


@pytest.mark.parametrize("case", UNETS)
def test_activations_of_real_shapes(case):
    """On the meta device, which makes every tensor but no numbers."""
    config, height, width = UNETS[case]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).eval()
        peak = measured(unet, *unet_inputs(config, 2, height, width, torch.float32))
    assert peak <= 2 * 4 * unet_activations(unet.config, height, width) <= 1.02 * peak


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (6, torch.float32), (2, torch.bfloat16)], ids=str)
def test_activations_of_a_real_forward_pass(rows, dtype):
    unet = UNet2DConditionModel(**BUNDLED).eval().to(dtype)
    peak = measured(unet, *unet_inputs(BUNDLED, rows, 12, 20, dtype))
    assert peak <= rows * dtype.itemsize * unet_activations(unet.config, 12, 20) <= 1.15 * peak


@pytest.mark.parametrize("case", UNETS)
def test_prompt_channels(case):
    config, _, _ = UNETS[case]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    ends = ("attn2.to_k", "attn2.to_v")
    expected = sum(module.out_features for name, module in unet.named_modules() if name.endswith(ends))
    assert prompt_channels(unet.config) == expected


PLAN = dict(height=64, width=64, itemsize=2, weights=2 * 10**9)


def test_the_parts_add_up_and_grow_with_the_batch():
    one = plan_sampling(SD14, SD_VAE, **PLAN, budget=None, most=1)
    four = plan_sampling(SD14, SD_VAE, **PLAN, budget=None, most=4, decode_batch=2)
    assert one.batch == 1 and four.batch == 4
    assert one.peak == one.weights + one.latents + one.activations + one.prompts + one.decode
    assert one.weights == four.weights == 2 * 10**9
    for part in ("latents", "activations", "prompts"):
        assert getattr(four, part) == 4 * getattr(one, part) > 0
    assert four.decode == 2 * one.decode
    assert one.prompts == 2 * 2 * 77 * 2 * 12480
    assert one.latents == 4 * 4 * 4 * 64 * 64 + 2 * 2 * (2 * 4 * 64 * 64 + 77 * 768)
    unguided = plan_sampling(SD14, SD_VAE, **PLAN, budget=None, most=1, guided=False)
    assert 2 * unguided.activations == one.activations and unguided.decode == one.decode


def test_the_largest_batch_that_fits():
    one = plan_sampling(SD14, SD_VAE, **PLAN, budget=None, most=1)
    each = one.latents + one.activations + one.prompts
    for batch in (1, 2, 5):
        budget = one.peak + (batch - 1) * each
        for given, expected in ((budget, batch), (budget + each - 1, batch), (budget + each, batch + 1)):
            plan = plan_sampling(SD14, SD_VAE, **PLAN, budget=given)
            assert plan.batch == expected and plan.peak <= given
    assert plan_sampling(SD14, SD_VAE, **PLAN, budget=10**15).batch == MOST_EDITS
    assert plan_sampling(SD14, SD_VAE, **PLAN, budget=10**15, most=3).batch == 3


def test_fewer_edits_are_planned_with_more_pictures_decoded_together():
    one = plan_sampling(SD14, SD_VAE, **PLAN, budget=None, most=1)
    budget = one.peak + one.decode
    assert plan_sampling(SD14, SD_VAE, **PLAN, budget=budget, decode_batch=8).batch == 1
    assert plan_sampling(SD14, SD_VAE, **PLAN, budget=budget, decode_batch=1).batch > 1


def test_pictures_are_decoded_in_bands_where_whole_does_not_fit():
    """In the tallest that fit, one by one, however many edits fit beside that; whole where one edit fits with it."""
    one = plan_sampling(SD14, SD_VAE, **PLAN, budget=None, most=1)
    rest, cost = one.peak - one.decode, VAECost(SD_VAE, 2, False)
    heights = [None, 256, 128, 64, 32, 16, 8]
    sizes = [cost.decode(64, 64, rows) for rows in heights]
    taller = plan_sampling(SD14, SD_VAE, **PLAN, budget=10**12)
    assert taller.decode_rows is None and taller.decode == sizes[0] == one.decode
    for rows, size in zip(heights, sizes, strict=True):
        if size < min(sizes[: heights.index(rows)], default=size + 1):
            plan = plan_sampling(SD14, SD_VAE, **PLAN, budget=rest + size, decode_batch=4)
            assert (plan.decode_rows, plan.decode, plan.batch) == (rows, size, 1)
            assert plan.peak == rest + size
    small = plan_sampling(BUNDLED, SD_VAE, **PLAN, budget=None, most=1)
    plan = plan_sampling(BUNDLED, SD_VAE, **PLAN, budget=small.peak - 1, decode_batch=4)
    assert plan.decode == cost.decode(64, 64, plan.decode_rows) and plan.batch > 1
    assert plan.peak < small.peak <= plan.peak + small.latents + small.activations + small.prompts


def test_no_edit_fits():
    one = plan_sampling(SD14, SD_VAE, **PLAN, budget=None, most=1)
    least = one.peak - one.decode + VAECost(SD_VAE, 2, False).decode(64, 64, 8)
    with pytest.raises(RuntimeError) as caught:
        plan_sampling(SD14, SD_VAE, **PLAN, budget=least - 1)
    message = str(caught.value)
    assert "one edit of 64 by 64 latents needs 2.36 GB (weights 2.00 GB, " in message
    assert "the budget is 2.36 GB; give more memory, or take a smaller picture or half precision" in message


def test_without_a_budget_the_batch_is_fixed():
    assert device_budget(torch.device("cpu")) is None
    assert plan_sampling(SD14, SD_VAE, **PLAN, budget=None).batch == CPU_EDITS
    assert plan_sampling(SD14, SD_VAE, **PLAN, budget=None, most=2).batch == 2


@pytest.mark.gpu
def test_the_budget_of_a_gpu_is_what_is_free_and_what_is_held():
    device = torch.device("cuda")
    before, total = device_budget(device), torch.cuda.get_device_properties(device).total_memory
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert abs(device_budget(device) - before) < 2**26 <= held.numel() < before <= total


@pytest.mark.parametrize(
    ("text", "amount"),
    {
        "1": 1,
        "8GB": 8 * 10**9,
        "8 GiB": 8 * 2**30,
        "8gb": 8 * 10**9,
        " 1.5kB ": 1500,
        "0.1MB": 10**5,
        "1.0005 KiB": 1024,
        "512MiB": 2**29,
        "2TB": 2 * 10**12,
        "1TiB": 2**40,
        "4096B": 4096,
        "123456789.123456789GB": 123456789123456789,
    }.items(),
)
def test_amounts_of_memory(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(
    "text", ["", "GB", "8G", "-8GB", "8 apples", "8GB 4", "1e9", "8,5GB", "inf", "0", "0.5", "0GB"]
)
def test_amounts_that_are_none(text):
    with pytest.raises(ValueError, match="such as 8GB"):
        parse_bytes(text)


def test_amounts_for_a_reader():
    assert [show_bytes(amount) for amount in (4_500_000_000, 272_655_360, 0)] == ["4.50 GB", "272.66 MB", "0.00 MB"]
