"""What the VAE's plan predicts, against what is really held, whole and in bands."""

import pytest
import torch
from diffusers import AutoencoderKL

from forgedit.engine.tune_plan import peak_during
from forgedit.engine.vae_plan import VAECost, choose_rows, in_words, ways
from forgedit.model.vae_bands import BandedVAE
from tests.runtime.live_bytes import measured

SD_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    in_channels=3,
)
BUNDLED_VAE = SD_VAE | dict(
    block_out_channels=(24, 48, 96),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    norm_num_groups=8,
)
VAES = {
    "sd": (SD_VAE, 64, 64),
    "sd-rectangle": (SD_VAE, 40, 100),
    "bundled": (BUNDLED_VAE, 16, 16),
    "wide-middle": (BUNDLED_VAE | dict(block_out_channels=(8, 8, 512)), 16, 16),
    "steep": (BUNDLED_VAE | dict(block_out_channels=(16, 64, 256)), 16, 16),
    "even": (BUNDLED_VAE | dict(block_out_channels=(64, 64, 64)), 16, 16),
}
CPU = torch.device("cpu")
QUARTER_SD = SD_VAE | dict(block_out_channels=(32, 64, 128, 128))  # wide enough for oneDNN to fill its blocks of 16


def both_ways(vae, rows, dtype, height, width, device, measure):
    """What a decode of latents of that size and an encode of their picture are measured to hold."""
    way = vae if rows is None else BandedVAE(vae, rows)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.zeros(1, 4, height, width, device=device)
    pixels = torch.zeros(1, 3, height * scale, width * scale, device=device)
    decoded = measure(latents, lambda latents: way.decode((latents / 0.18).to(dtype)))
    encoded = measure(pixels, lambda pixels: way.encode((pixels * 2).to(dtype)))
    return decoded, encoded


@pytest.mark.parametrize("rows", [None, 16])
@pytest.mark.parametrize("case", VAES)
def test_real_shapes(case, rows):
    """On the meta device, which makes every tensor but no numbers, and no copies inside of an operation."""
    config, height, width = VAES[case]
    with torch.device("meta"):
        vae = AutoencoderKL(**config).eval()
    cost = VAECost(vae.config, 4, copies=False)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    decoded, encoded = both_ways(
        vae, rows, torch.float32, height, width, "meta", lambda x, call: measured(vae, x, call=call)
    )
    assert decoded <= cost.decode(height, width, rows) <= 1.15 * decoded
    assert encoded <= cost.encode(height * scale, width * scale, rows) <= 1.15 * encoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, 32, 8])
def test_the_prediction_is_within_15_percent(dtype, rows):
    """Of what a CPU is measured to hold, oneDNN's copies of contiguous maps among it."""
    if dtype != torch.float32 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        pytest.skip("this CPU emulates bfloat16: its convolutions unfold their input, which is not predicted")
    vae = AutoencoderKL(**QUARTER_SD).eval().to(dtype)
    if dtype != torch.float32:
        vae = vae.to(memory_format=torch.channels_last)
    cost = VAECost(vae.config, dtype.itemsize, copies=dtype == torch.float32)
    with torch.no_grad():
        decoded, encoded = both_ways(vae, rows, dtype, 16, 24, "cpu", lambda x, call: peak_during(lambda: call(x), CPU))
    assert cost.decode(16, 24, rows) == pytest.approx(decoded, rel=0.15)
    assert cost.encode(128, 192, rows) == pytest.approx(encoded, rel=0.15)


def test_at_1024_pixels_bands_hold_less_than_half():
    cost = VAECost(SD_VAE, 4, copies=True)
    for way, size in ((cost.decode, 128), (cost.encode, 1024)):
        held = [way(size, size, rows) for rows in (64, 32, 16, 8)]
        assert held == sorted(held, reverse=True) and held[1] < 0.5 * way(size, size, None)


def test_whole_then_the_tallest_bands_that_fit():
    assert list(ways(64)) == [None, 32, 16, 8] and list(ways(72)) == [None, 64, 32, 16, 8] and list(ways(8)) == [None]
    needed = {None: 100, 32: 120, 16: 60, 8: 40}.__getitem__
    assert [choose_rows(needed, 64, room) for room in (120, 100, 99, 60, 59, 40)] == [
        (None, 100), (None, 100), (16, 60), (16, 60), (8, 40), (8, 40)
    ]  # fmt: skip
    assert choose_rows(needed, 64, 39) == (8, 40)  # the least, for a refusal to name
    assert in_words(None) == "whole" and in_words(16) == "in bands of 16 rows"
