"""Structure must not see colours, appearance must not see shapes; versions that do are told from them."""

from dataclasses import replace

import pytest
import torch

from bench.world import aspects
from bench.world.aspects import colour_distance, oriented_gradients, structure, to_lab
from forgedit.world.render import render
from forgedit.world.scene import OBJECTS, PATTERNED, Scenes, sample_scenes

N = 12


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Plain things, as stripes have edges of their own."""
    found = sample_scenes(60, 3)
    things = torch.tensor([name in PATTERNED for name in OBJECTS])[found.object]
    return replace(found, pattern=torch.zeros_like(found.pattern))[things.nonzero()[:N, 0]]


@pytest.fixture(scope="module")
def pictures(scenes):
    return render(scenes)[0]


def recoloured(scenes: Scenes):
    return render(replace(scenes, colour=(scenes.colour + 4) % 8))[0]


def reshaped(scenes: Scenes):
    """Mugs for the rest, hearts for mugs."""
    mug, heart = OBJECTS.index("mug"), OBJECTS.index("heart")
    return render(replace(scenes, object=torch.where(scenes.object == mug, heart, mug)))[0]


def test_the_same_picture(pictures) -> None:
    assert torch.allclose(structure(pictures, pictures), torch.ones(N))
    assert not colour_distance(pictures, pictures).any()


def test_structure_does_not_see_colours(pictures, scenes) -> None:
    for changed in (pictures.flip(1), -pictures):  # channels change places; light and dark do
        assert torch.allclose(structure(pictures, changed), torch.ones(N), atol=1e-5)
        assert colour_distance(pictures, changed).median() > 10
    loss_by_colour, loss_by_shape = (1 - structure(pictures, p(scenes)).mean() for p in (recoloured, reshaped))
    assert loss_by_colour < 0.3 * loss_by_shape


def test_appearance_does_not_see_shapes(pictures, scenes) -> None:
    turned = pictures.roll((9, 20), dims=(2, 3)).flip(3)
    assert torch.allclose(colour_distance(pictures, turned), torch.zeros(N), atol=1e-5)
    assert structure(pictures, turned).max() < 0.9
    by_colour, by_shape = (colour_distance(pictures, p(scenes)).mean() for p in (recoloured, reshaped))
    assert by_shape < 0.3 * by_colour


def test_wrong_versions_are_told_apart(pictures) -> None:
    """Gradients with a sign, gradients of luminance, and colours compared where they are."""
    turned = pictures.flip(3)
    in_place = (to_lab(pictures) - to_lab(turned)).square().sum(1).sqrt().mean((1, 2))
    assert in_place.min() > 1 and colour_distance(pictures, turned).max() < 1e-5
    luminance = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey, swapped = ((p * luminance).sum(1, keepdim=True).expand(-1, 3, -1, -1) for p in (pictures, pictures.flip(1)))
    assert structure(grey, swapped).min() < 0.98
    signed = [torch.cat([p[..., 1:] - p[..., :-1]], 3).flatten(1) for p in (pictures, -pictures)]
    assert torch.cosine_similarity(*signed).max() < 0


def test_a_shift_of_all_colours_reads_as_its_length(monkeypatch) -> None:
    grey = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)).expand(1, 3, 32, 32) - 0.5
    lighter = torch.tensor([10.0, 0.0, 0.0]).view(1, 3, 1, 1)
    lab = to_lab(grey.double())
    asked = iter([lab, lab + lighter])
    monkeypatch.setattr(aspects, "to_lab", lambda pixels: next(asked))
    assert colour_distance(grey, grey).item() == pytest.approx(10, rel=0.1)


def test_lab_of_known_colours() -> None:
    """White, sRGB's red, and mid grey."""
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [0.0, 0.0, 0.0]])
    seen = to_lab(colours.view(3, 3, 1, 1)).view(3, 3)
    wanted = torch.tensor([[100.0, 0.0, 0.0], [53.24, 80.09, 67.20], [53.39, 0.0, 0.0]])
    assert torch.allclose(seen, wanted, atol=0.05)


def test_a_flat_picture_has_no_structure_of_its_own_noise() -> None:
    flat = torch.zeros(1, 3, 64, 64)
    noise = 0.002 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert oriented_gradients(flat + noise).norm() < 0.5


def test_sides_that_cells_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        structure(torch.zeros(1, 3, 60, 60), torch.zeros(1, 3, 60, 60))
