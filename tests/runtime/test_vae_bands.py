"""The VAE in bands against the VAE itself in float64, and whole edits with and without a budget that wants bands."""

import copy
import inspect
import logging
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn.functional import silu

from forgedit import EditConfig, Editor, TuneConfig
from forgedit.engine.plan import show_bytes
from forgedit.engine.vae_plan import VAECost
from forgedit.model import vae_bands
from forgedit.model.vae_bands import BandedVAE

FLOORS = {torch.float64: 2.0**-44, torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPED = dict(
    block_out_channels=(8, 16, 32, 32),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=4,
)
VAES = {
    "sd-shaped": SHAPED,
    "bundled-shaped": SHAPED
    | dict(
        block_out_channels=(16, 16, 24),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
    ),
    "bare": SHAPED | dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
}
SD14 = SHAPED | dict(block_out_channels=(128, 256, 512, 512), norm_num_groups=32)


def made(config, dtype=torch.float32, layout=torch.contiguous_format, device="cpu"):
    """Random weights; biases and norms of no layer are what a fresh module has."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**config).eval().requires_grad_(False)
    for weight in vae.parameters():
        weight.add_(0.1 * torch.randn_like(weight) if weight.dim() == 1 else 0)
    return torch.nn.Module.to(vae, device, dtype).to(memory_format=layout)


def inputs(vae, height, width, batch=1):
    """Latents, and pixels, whose mean grows from row to row: a band's statistics are not the map's."""
    scale, generator = 2 ** (len(vae.config.block_out_channels) - 1), torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    pixels = torch.randn(batch, 3, height * scale, width * scale, generator=generator)
    graded = [x + torch.linspace(-2, 4, x.shape[2])[:, None] for x in (latents, pixels)]
    return [x.to(vae.device, vae.dtype) for x in graded]


def through(vae, latents, pixels):
    """Decoded, and the posterior's mean and logarithm of the variance."""
    with torch.no_grad():
        return vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters


def is_as_exact(way, vae, given):
    """That an error is at most twice the VAE's own in its dtype, and a floor; both against float64."""
    oracle = torch.nn.Module.to(copy.deepcopy(vae), torch.float64).to(memory_format=torch.contiguous_format)
    truths = through(oracle, *(x.double() for x in given))
    for got, own, truth in zip(through(way, *given), through(vae, *given), truths, strict=True):
        assert got.dtype == own.dtype and got.shape == own.shape
        bound = 2 * (own - truth).abs().max() + FLOORS[vae.dtype] * truth.abs().max()
        if not (got - truth).abs().max() <= bound:
            return False
    return True


@pytest.mark.parametrize("rows", [2, 6, 16, 512])
@pytest.mark.parametrize("case", VAES)
def test_the_picture_is_the_same(case, rows):
    """Heights that bands divide and that they do not; more rows than there are."""
    vae = made(VAES[case])
    assert is_as_exact(BandedVAE(vae, rows), vae, inputs(vae, 5, 7, batch=2))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float64, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.contiguous_format),
        (torch.bfloat16, torch.channels_last),
    ],
    ids=str,
)
def test_the_picture_is_the_same_in_every_dtype_and_layout(dtype, layout):
    vae = made(SHAPED, dtype, layout)
    banded = BandedVAE(vae, 6)
    assert is_as_exact(banded, vae, inputs(vae, 5, 7))
    assert all(
        x.is_contiguous(memory_format=layout) for x in through(banded, *inputs(vae, 5, 7)) if dtype != torch.float64
    )


def broken(old, new):
    """The file with some of its words replaced."""
    source = inspect.getsource(vae_bands)
    assert source.count(old) == 1
    module = ModuleType("broken")
    exec(compile(source.replace(old, new), "broken", "exec"), module.__dict__)
    return module


WRONG = {
    "no row above": ("rows.start // scale - 1, 0)", "rows.start // scale, 0)"),
    "no row below": ("-(-rows.stop // scale) + 1", "-(-rows.stop // scale)"),
    "statistics of each band": ("normed.activated(band)", "_WholeNorm(band, norm, self._rows).activated(band)"),
    "means of the bands alike": ("square + count * (mean - whole).square()", "square"),
    "bands alike in size": ("torch.tensor(counts,", "torch.tensor([counts[0]] * len(counts),"),
    "written before the next is read": (
        "            if normed is not None:\n",
        "            if done is not None:\n                take(*done)\n                done = None\n"
        "            if normed is not None:\n",
    ),
    "padded on the left": ("(0, 1, 0, missing)", "(1, 0, 0, missing)"),
    "padded above": ("(0, 1, 0, missing)", "(0, 1, missing, 0)"),
    "no shortcut": ("band.add_(shortcut(x[:, :, rows]))", "band"),
    "no activation": ("silu(normed, inplace=True)", "normed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_version_is_rejected(case):
    vae = made(SHAPED)
    assert not is_as_exact(broken(*WRONG[case]).BandedVAE(vae, 6), vae, inputs(vae, 5, 7))


def norm_is_as_exact(module, dtype):
    """Norm and SiLU of a map far from zero, by the same rule."""
    generator = torch.Generator().manual_seed(0)
    x = (30 + torch.randn(2, 8, 9, 5, generator=generator)).to(dtype)
    norm = torch.nn.GroupNorm(4, 8, eps=1e-6, dtype=dtype).requires_grad_(False)
    truth = silu(copy.deepcopy(norm).double()(x.double()))
    error = (module._WholeNorm(x, norm, 2).activated(x) - truth).abs().max()
    return bool(error <= 2 * (silu(norm(x)) - truth).abs().max() + FLOORS[dtype] * truth.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_far_from_zero(dtype):
    assert norm_is_as_exact(vae_bands, dtype)
    if dtype == torch.float32:
        squares = "(grouped - mean).square_().sum((2, 3, 4))"
        difference = "grouped.square().sum((2, 3, 4)) - grouped[0, 0].numel() * mean[:, :, 0, 0, 0].square()"
        assert not norm_is_as_exact(broken(squares, difference), dtype)
    else:
        assert not norm_is_as_exact(broken("torch.promote_types(x.dtype, torch.float32)", "x.dtype"), dtype)


def test_tiles_are_rejected():
    """diffusers' own way to save memory, and the latents decoded in two halves."""
    vae = made(SHAPED)
    latents, pixels = given = inputs(vae, 16, 8)
    tiled = copy.deepcopy(vae)
    tiled.enable_tiling()
    tiled.tile_latent_min_size, tiled.tile_sample_min_size = 8, 64
    assert not is_as_exact(tiled, vae, given)
    with torch.no_grad():
        halves = torch.cat([vae.decode(part).sample for part in latents.split(8, 2)], 2)
    assert (halves - through(vae, latents, pixels)[0]).abs().max() > 0.01


def test_nothing_given_is_written():
    vae = made(SHAPED)
    given = inputs(vae, 5, 7)
    before = copy.deepcopy((vae.state_dict(), given))
    through(BandedVAE(vae, 4), *given)
    assert all(torch.equal(weight, before[0][name]) for name, weight in vae.state_dict().items())
    assert all(map(torch.equal, given, before[1]))


def test_what_cannot_go_in_bands_is_refused():
    vae = made(SHAPED)
    for rows in (0, 1, 7, -2):
        with pytest.raises(ValueError, match=f"a band of {rows} rows is not possible; expected an even number"):
            BandedVAE(vae, rows)
    others = SHAPED | dict(down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",))
    with pytest.raises(ValueError, match=r"blocks \['AttnDownEncoderBlock2D'\] and activation 'silu' cannot work"):
        BandedVAE(AutoencoderKL(**others), 8)
    with pytest.raises(ValueError, match=r"blocks \[\] and activation 'gelu' cannot work in bands; expected only"):
        BandedVAE(AutoencoderKL(**SHAPED, act_fn="gelu"), 8)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_at_stable_diffusions_size_on_a_gpu(dtype, layout):
    vae = made(SD14, dtype, layout, "cuda")
    assert is_as_exact(BandedVAE(vae, 64), vae, inputs(vae, 40, 64))


# whole edits


TUNE = TuneConfig(num_steps=1, batch_size=1, caption="a red mug on grass")
EDIT = EditConfig(strategy="encoderattn", num_steps=2)


def picture_of(width, height, folder):
    """The path of a smooth picture."""
    y, x = np.mgrid[0:height, 0:width] / 256
    pixels = np.stack([200 * y, 255 * x, 120 + 80 * np.sin(9 * x * y)], -1)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "photo.png")
    return folder / "photo.png"


def largest_difference(one, other):
    """Of two edits' pictures, in steps of 1/255."""
    return np.abs(np.asarray(one.image, dtype=int) - np.asarray(other.image, dtype=int)).max()


def test_a_budget_has_edits_decoded_in_bands_and_the_picture_stays(tmp_path, caplog):
    editor = Editor.from_pretrained("bundled")
    session = editor.tune(picture_of(192, 128, tmp_path), TUNE.replace(width=192, height=128))
    whole = session.edit("a blue mug on grass", EDIT)
    plan = editor._path.plan((4, 32, 48))
    cost = VAECost(editor.model.vae.config, 4, copies=True)
    rest = plan.weights + (plan.latents + plan.activations + plan.prompts) // plan.batch
    with caplog.at_level(logging.INFO, "forgedit"):
        for rows in (64, 16):
            budget = rest + cost.decode(32, 48, rows)
            assert budget < rest + cost.decode(32, 48, None)
            tight = Editor(editor.model, memory_bytes=budget)
            edit = replace(session, editor=tight, prompts={}).edit("a blue mug on grass", EDIT)
            assert f"sample: 1 edits at once, decoded in bands of {rows} rows; predicted at most: " in caplog.text
            assert torch.equal(edit.latents, whole.latents) and largest_difference(edit, whole) <= 1
        roomy = Editor(editor.model, memory_bytes=10**10)
        edit = replace(session, editor=roomy, prompts={}).edit("a blue mug on grass", EDIT)
    assert "edits at once, decoded whole; predicted at most: " in caplog.text
    assert largest_difference(edit, whole) == 0


def test_a_budget_has_a_photo_encoded_in_bands(folder, tmp_path, caplog, monkeypatch):
    """With a VAE that needs more than learning does."""
    wide = made(VAES["bundled-shaped"] | dict(block_out_channels=(32, 32, 64)))
    editor = Editor(replace(Editor.from_pretrained(folder).model, vae=wide))
    photo, seen = picture_of(192, 256, tmp_path), []
    tune = TUNE.replace(width=192, height=256, caption="a cat")
    path = editor._method_path()
    learn = path.learn
    monkeypatch.setattr(path, "learn", lambda inputs: seen.append(inputs.latents) or learn(inputs))
    whole = editor.tune(photo, tune)
    budget = path._held() + VAECost(wide.config, 4, copies=True).encode(256, 192, 64)
    with caplog.at_level(logging.INFO, "forgedit"):
        banded = [editor.tune(photo, tune.replace(memory_bytes=budget)) for _ in range(2)]
        assert caplog.text.count(f"encode: in bands of 64 rows; predicted at most: {show_bytes(budget)} of") == 1
        assert "predicted at most" not in [r.message for r in caplog.records if r.levelno >= logging.WARNING]
        assert 0 < (seen[1] - seen[0]).abs().max() < 1e-4 * seen[0].abs().max()
        assert torch.equal(seen[2], seen[1])
        assert largest_difference(banded[0].edit("a dog", EDIT), whole.edit("a dog", EDIT)) <= 1
        with pytest.raises(RuntimeError, match="learning this photo needs at least"):
            editor.tune(photo, tune.replace(memory_bytes=10**6))
    (warning,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning.startswith("encode: in bands of 8 rows; predicted at most: ") and warning.endswith(" of 1.00 MB")


def test_the_plain_path_stays_whole(reference_editor):
    path = reference_editor._method_path()
    assert path.encoder(1024, 1024, 1) is reference_editor.model.vae
