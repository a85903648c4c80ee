"""Similarity and direction: on vectors whose answer is known, and by the bundled scorer on true edits of the world."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from forgedit.model.load import BUNDLED
from forgedit.model.scorer import load_scorer
from forgedit.quality.agreement import Scorer, direction, similarity
from forgedit.world.render import render
from forgedit.world.scene import ATTRIBUTES, Edits, Scenes, captions, sample_edits, targets_of
from forgedit.world.score import to_images

WORDS = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0), "both": (0.6, 0.0, 0.8)}


class Fixed:
    """Knows two things, by a picture's red and blue or by the word, and one that no word names, by its green."""

    name = "fixed"

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.tensor([image.getpixel((0, 0)) for image in images]).float()
        return torch.nn.functional.normalize(pixels, dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([WORDS[text] for text in texts])


def seen(*colours: str) -> Tensor:
    scorer: Scorer = Fixed()
    return scorer.embed_images([Image.new("RGB", (4, 4), colour) for colour in colours])


def told(*words: str) -> Tensor:
    scorer: Scorer = Fixed()
    return scorer.embed_texts(words)


def test_similarity_is_the_cosine_of_each_row_or_of_all_with_one():
    texts = told("red", "blue", "both")
    assert torch.allclose(similarity(seen("red", "red", "red"), texts), torch.tensor([1.0, 0.0, 0.6]))
    assert torch.equal(similarity(seen("red"), texts), similarity(seen("red", "red", "red"), texts))
    assert similarity(seen("red")[:, None], texts).shape == (1, 3)


@pytest.mark.parametrize(
    "edit, expected",
    [
        ("blue", 1.0),  # exactly what was asked for
        ("red", 0.0),  # unchanged
        ("#00ff00", 0.5),  # red is gone, and something else came
        ("magenta", 1 / (2 * (1 - 0.5**0.5)) ** 0.5 * 0.5**0.5),  # half way along the circle
    ],
)
def test_direction_on_known_vectors(edit, expected):
    found = direction(seen("red"), seen(edit), told("red"), told("blue"))
    assert found.tolist() == pytest.approx([expected], abs=1e-6)


def test_direction_against_the_words_is_negative_and_without_words_none():
    red, blue = seen("red"), seen("blue")
    assert direction(blue, red, told("red"), told("blue")).tolist() == pytest.approx([-1.0])
    assert direction(red, blue, told("red"), told("red")).tolist() == [0.0]


def test_direction_of_many_edits_of_one_photo():
    edits = seen("blue", "red", "#00ff00")
    found = direction(seen("red"), edits, told("red"), told("blue"))
    assert found.argsort(descending=True).tolist() == [0, 2, 1]


def another(edits: Edits) -> Scenes:
    """The same photos edited otherwise: another value of the same attribute, or where it has only two, of colour."""
    combinations = []
    for source, target, kind in zip(edits.source.combinations(), edits.target.combinations(), edits.kind, strict=True):
        others = [c for c in targets_of(source, kind, "all") if c != target] or targets_of(source, "colour", "all")
        combinations.append(others[-1])
    columns = torch.tensor(combinations).unbind(1)
    return replace(edits.source, **dict(zip(ATTRIBUTES, columns, strict=True)))


def test_the_bundled_scorer_points_along_true_edits():
    """True edits, six of each kind, stand above the photo unchanged and above a true edit to something else."""
    scorer, edits = load_scorer(BUNDLED / "scorer"), sample_edits(6, 11)
    scenes = (edits.source, edits.target, another(edits))
    photo, true, wrong = (scorer.embed_images(to_images(render(each)[0])) for each in scenes)
    source, target = (scorer.embed_texts(captions(each)) for each in (edits.source, edits.target))
    along = direction(photo, true, source, target)
    assert (along > 0.3).float().mean() >= 0.9  # an unchanged photo has 0
    assert (along > direction(photo, wrong, source, target)).float().mean() >= 0.9
    assert (similarity(true, target) > similarity(photo, target)).float().mean() >= 0.9
    assert (similarity(true, target) > similarity(wrong, target)).float().mean() >= 0.9
