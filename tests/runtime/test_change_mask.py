"""Where to change: the mask found, the mask given, and what is composited; bytes outside it."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from forgedit import Editor, InputError
from forgedit.quality import change_mask, composite
from forgedit.quality.change_mask import ChangeMask, clean, heat_map, otsu, smooth
from forgedit.quality.composite import depth, fit_mask, keep_outside, mask_of
from forgedit.stages.sample import clean_and_noise

TIMESTEPS = torch.tensor([100, 500, 900])


@pytest.mark.parametrize("numerics", ["reference", "exact"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predicted_noise_is_diffusers(folder, numerics, prediction_type):
    """Each prompt's answer alone, row by row, as noise; rows and prompts are not mixed up."""
    editor = Editor.from_pretrained(folder, numerics=numerics, prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(3, 4, 8, 8, generator=generator)
    embeddings = torch.randn(2, 77, 32, generator=generator)
    got = editor._method_path().predict(noisy, TIMESTEPS, embeddings)
    assert got.shape == (2, *noisy.shape)
    with torch.no_grad():
        for k, embedding in enumerate(embeddings):
            for b, timestep in enumerate(TIMESTEPS):
                one = noisy[b : b + 1]
                answer = editor.model.unet(one, timestep, embedding[None], return_dict=False)[0]
                noise = clean_and_noise(one, answer, editor.model.alphas_cumprod[timestep], prediction_type)[1]
                assert (got[k, b] - noise[0]).norm() <= 1e-5 * noise.norm()
                wrong = got[1 - k, b], got[k, b - 1]
                assert all((other - noise[0]).norm() > 1e-3 * noise.norm() for other in wrong)


def ramp(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """A photo in which no two neighbours are alike, and hidden colours lie under its opacity."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    values[::3, :, 3] = 0
    return Image.fromarray(values if mode == "RGBA" else values[..., :3].copy())


def disc(size: tuple[int, int]) -> Image.Image:
    y, x = np.mgrid[: size[1], : size[0]]
    inside = ((x - size[0] * 0.4) / size[0]) ** 2 + ((y - size[1] * 0.5) / size[1]) ** 2 < 0.07
    return Image.fromarray(inside.astype(np.uint8) * 255)


def touched_cells(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Pixel by pixel, in exact arithmetic: is every cell of the mask that the pixel overlaps inside?"""
    inside = np.asarray(mask) > 0
    rows, columns = inside.shape
    expected = np.empty((size[1], size[0]), dtype=bool)
    for y in range(size[1]):
        ys = [row for row in range(rows) if row * size[1] < (y + 1) * rows and (row + 1) * size[1] > y * rows]
        for x in range(size[0]):
            xs = [c for c in range(columns) if c * size[0] < (x + 1) * columns and (c + 1) * size[0] > x * columns]
            expected[y, x] = inside[np.ix_(ys, xs)].all()
    return expected


SIZES = [(16, 16), (17, 31), (37, 16), (64, 48), (101, 53), (29, 97)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("of", [(16, 16), (23, 18), (64, 64)], ids=str)
def test_a_mask_is_fitted_and_never_leaks(of, size):
    mask, expected = disc(of), touched_cells(disc(of), size)
    assert np.array_equal(fit_mask(mask, size), expected)
    nearest = np.asarray(mask.resize(size, Image.Resampling.NEAREST)) > 0
    if size[0] % of[0] or size[1] % of[1]:  # what Pillow's own resizing would have covered reaches over
        assert (nearest & ~expected).any()


def wrongly_fitted(mask, size):
    return np.asarray(mask.resize(size, Image.Resampling.NEAREST)) > 0


def feathered_both_ways(steps):
    """A feather that is centred on the mask's edge instead of lying inside it."""
    picture = Image.fromarray(np.minimum(steps * 64, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(2))).astype(np.int32)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [*SIZES, (400, 301)], ids=str)
def test_outside_is_the_photo_byte_for_byte(size, mode, monkeypatch):
    photo, mask = ramp(size, mode), disc((16, 12))
    black = Image.new("RGB", size)
    outside = ~touched_cells(mask, size)

    def changed_outside() -> bool:
        made = keep_outside(photo, black, mask, feather=3)
        assert (made.mode, made.size) == (mode, size)
        if mode == "RGBA":
            assert np.array_equal(np.asarray(made)[..., 3], np.asarray(photo)[..., 3])
        return not np.array_equal(np.asarray(made)[outside], np.asarray(photo)[outside])

    assert not changed_outside()
    monkeypatch.setattr(composite, "fit_mask", wrongly_fitted)
    assert changed_outside() or np.array_equal(wrongly_fitted(mask, size), ~outside)
    monkeypatch.undo()
    right = composite.depth
    monkeypatch.setattr(composite, "depth", lambda inside: feathered_both_ways(right(inside)))
    assert changed_outside()


def test_depth_is_the_way_out():
    inside = np.asarray(disc((31, 22))) > 0
    inside[3, 0] = True
    ys, xs = np.nonzero(~inside)
    expected = [[(abs(ys - y) + abs(xs - x)).min() for x in range(31)] for y in range(22)]
    assert np.array_equal(depth(inside), expected)


def test_the_feather_lies_inside_and_ends():
    photo, white = Image.new("RGB", (60, 40)), Image.new("RGB", (60, 40), "white")
    mask = mask_of((10, 0, 50, 40), (60, 40))
    row = np.asarray(keep_outside(photo, white, mask, feather=3))[20, :, 0].tolist()
    assert row[:10] == [0] * 10 and row[50:] == [0] * 10
    assert row[10:14] == [63, 127, 191, 255] == row[46:50][::-1] and set(row[14:46]) == {255}
    assert (np.asarray(keep_outside(photo, white, mask, feather=3))[:, 20] == 255).all()  # not at the photo's edge
    sharp = np.asarray(keep_outside(photo, white, mask, feather=0))[20, :, 0]
    assert (sharp[10:50] == 255).all() and sharp.sum() == 40 * 255
    thin = mask_of((10, 20, 50, 23), (60, 40))
    assert np.asarray(keep_outside(photo, white, thin, feather=30))[:, 30, 0].tolist()[19:24] == [0, 127, 255, 127, 0]


def test_a_given_mask_is_black_and_white(tmp_path):
    picture = disc((40, 24))
    picture.save(tmp_path / "mask.png")
    picture.convert("1").save(tmp_path / "one.png")
    picture.convert("RGB").save(tmp_path / "mask.jpg", quality=95)
    for given in (
        picture,
        picture.convert("1"),
        tmp_path / "mask.png",
        str(tmp_path / "one.png"),
        tmp_path / "mask.jpg",
    ):
        mask = ChangeMask.given(given, (80, 48))
        assert np.array_equal(np.asarray(mask.mask), np.asarray(picture)) and mask.heat is None
        assert mask.share == np.count_nonzero(np.asarray(picture)) / (40 * 24)
    grey = Image.fromarray(np.repeat(np.array([[0, 127, 128, 255]], dtype=np.uint8), 10, axis=1).repeat(24, axis=0))
    assert np.unique(np.asarray(mask_of(grey, (40, 24)))[0, 10:30]).tolist() == [0, 255]
    assert np.asarray(mask_of(grey, (40, 24)))[0, [5, 15, 25, 35]].tolist() == [0, 0, 255, 255]
    box = ChangeMask.given((3, 4, 13, 9), (80, 48))
    assert np.argwhere(np.asarray(box.mask)).min(0).tolist() == [4, 3]
    assert np.argwhere(np.asarray(box.mask)).max(0).tolist() == [8, 12] and box.share == 50 / (80 * 48)


def clear():
    picture = disc((40, 24)).convert("RGBA")
    picture.putpixel((0, 0), (0, 0, 0, 0))
    return picture


@pytest.mark.parametrize(
    "given, message",
    [
        (Image.new("L", (40, 24)), "the mask is empty"),
        (Image.new("L", (40, 24), 255), "covers 100.0% .* at most 95%"),
        (disc((24, 40)), "the mask has 24 by 40 pixels, the photo 80 by 48; expected one aspect ratio"),
        (disc((40, 26)), "expected one aspect ratio"),
        (clear(), "the mask is transparent in places"),
        ("missing.png", "cannot read the mask 'missing.png': No such file"),
        ((0, 0, 80, 47), "covers 97.9%"),
        ((-1, 0, 40, 20), "reaches outside the photo; expected left and right in \\[0, 80\\]"),
        ((0, 0, 81, 20), "the rectangle 0,0,81,20 reaches outside"),
        ((0, 20, 40, 49), "top and bottom in \\[0, 48\\]"),
        ((40, 0, 40, 20), "the rectangle 40,0,40,20 is empty"),
        ((0, 20, 40, 10), "is empty; expected left < right and top < bottom"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_given_mask_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        ChangeMask.given(given, (80, 48))


def test_a_mask_too_small_for_the_photo():
    speck = Image.new("L", (90, 90))
    speck.putpixel((4, 4), 255)
    with pytest.raises(InputError, match="no whole pixel of the photo"):
        keep_outside(ramp((31, 31)), ramp((31, 31)), speck, 1)


def test_otsu_parts_two_classes():
    """Against the definition, split by split; and against the plainer rules it was chosen over."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(900, generator=generator) * 0.1, 2 + torch.randn(100, generator=generator) * 0.3])
    values = values[torch.randperm(1000, generator=generator)].view(20, 50)
    ordered = values.flatten().double().sort().values
    within = [ordered[:k].var(correction=0) * k + ordered[k:].var(correction=0) * (1000 - k) for k in range(1, 1000)]
    best = int(torch.stack(within).argmin()) + 1
    assert otsu(values) == pytest.approx(float(ordered[best - 1 : best + 1].mean()))
    assert int((values > otsu(values)).sum()) == 100
    assert int((values > values.mean()).sum()) != 100 and int((values > values.quantile(0.8)).sum()) != 100
    assert not (torch.ones(4, 4) > otsu(torch.ones(4, 4))).any()


def test_smooth_keeps_the_sum_and_spreads_it():
    point = torch.zeros(31, 41)
    point[15, 20] = 1
    spread = smooth(point, 2.0)
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    y = torch.arange(31.0) - 15
    assert float((spread.sum(1) * y**2).sum()) == pytest.approx(4, rel=0.03)
    assert torch.allclose(smooth(torch.full((9, 12), 3.0), 2.0), torch.full((9, 12), 3.0))


def test_clean_drops_what_is_narrow():
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[10:40, 10:40] = True
    whole = inside.clone()
    inside[20:24, 20:24] = False  # a hole
    inside[10:40, 30:32] = False  # a gap through it
    inside[50:54, 50:54] = True  # a speck
    inside[25:27, 40:60] = True  # a spur
    assert torch.equal(clean(inside), whole)
    wide = whole.clone()
    wide[20:26, 20:26] = False
    assert torch.equal(clean(wide), wide)


@pytest.mark.parametrize("noisy", [False, True], ids=["exact outside", "noise outside"])
def test_heat_is_high_where_both_maps_are(noisy, monkeypatch):
    noise, colours = torch.ones(8, 8), np.full((32, 32, 3), 100, dtype=np.uint8)
    noise[2:6, 2:6] = 5
    noise[:, 7] = 5  # where the words differ, and nothing came of it
    edited = colours.copy()
    edited[8:24, 8:24] = 180
    edited[28:, :] = 180  # where the edit drifted
    if noisy:
        edited += np.random.default_rng(0).integers(0, 9, edited.shape, dtype=np.uint8)
    heat = heat_map(noise, Image.fromarray(edited), Image.fromarray(colours))
    assert heat.shape == (32, 32) and heat.min() >= 0 and heat.max() == 1
    true = np.zeros((32, 32), dtype=bool)
    true[8:24, 8:24] = True

    def iou(heat):
        inside = np.asarray(ChangeMask.found(heat).mask) > 0
        return (inside & true).sum() / (inside | true).sum()

    assert iou(heat) > 0.8
    monkeypatch.setattr(change_mask, "FLOOR", 0.0)
    assert noisy or iou(heat_map(noise, Image.fromarray(edited), Image.fromarray(colours))) < 0.7
    same = ChangeMask.found(heat_map(noise, Image.fromarray(colours), Image.fromarray(colours)))
    assert same.share == 0 and not same.heat.any()
