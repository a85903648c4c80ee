"""Scenes, splits, captions and renders: what the ground truth rests on."""

import pytest
import torch

from bench.world.captioner import parse_caption
from forgedit.world.render import changed_mask, render
from forgedit.world.scene import (
    ATTRIBUTES,
    KINDS,
    all_combinations,
    caption,
    has_pattern,
    has_pose,
    is_held_out,
    place,
    sample_edits,
    sample_scenes,
)

SIZE = 32  # pixels; the renderer is the same at any size


@pytest.mark.parametrize("prefix", ["", "a photo of ", "A photo of "])
def test_every_caption_reads_back(prefix: str) -> None:
    for combination in all_combinations():
        words = parse_caption(prefix + caption(combination))
        assert tuple(words[name] for name in ATTRIBUTES) == combination


def test_captions_are_all_different() -> None:
    assert len({caption(combination) for combination in all_combinations()}) == len(all_combinations())


def test_a_caption_that_names_nothing() -> None:
    assert parse_caption("a photo of a cat") == dict.fromkeys(ATTRIBUTES) | {"pattern": 0}


def test_a_wrong_pose_word_is_not_a_pose() -> None:
    assert parse_caption("a smiling blue bird on snow")["pose"] is None


def test_held_out_combinations_are_never_trained_on() -> None:
    train = set(sample_scenes(20_000, 3).combinations())
    held_out = set(sample_scenes(5_000, 3, "heldout").combinations())
    assert not train & held_out
    assert not any(is_held_out(combination) for combination in train)
    assert held_out <= set(all_combinations("heldout"))
    assert len(all_combinations("train")) + len(all_combinations("heldout")) == len(all_combinations())


def test_the_held_out_split_covers_every_attribute_value() -> None:
    columns = list(zip(*all_combinations("heldout"), strict=True))
    assert [len(set(column)) for column in columns] == [len(set(c)) for c in zip(*all_combinations(), strict=True)]


def test_edits_change_one_attribute_and_keep_the_rest() -> None:
    edits = sample_edits(20, seed=5)
    assert edits.kind == [kind for kind in KINDS for _ in range(20)]
    pairs = zip(edits.kind, edits.source.combinations(), edits.target.combinations(), strict=True)
    for kind, source, target in pairs:
        changed = {name for name, a, b in zip(ATTRIBUTES, source, target, strict=True) if a != b}
        assert changed - {"pose"} == {kind} - {"pose"} and kind in changed
        assert "pose" not in changed or kind in ("pose", "object")
        assert is_held_out(source) and is_held_out(target)
        assert has_pose(target[0]) or target[1] == 0
        assert has_pattern(target[0]) or target[3] == 0
    for name in ("x", "y", "size", "angle", "light", "noise_seed"):
        assert torch.equal(getattr(edits.source, name), getattr(edits.target, name))


def test_renders_repeat_alone_and_in_any_batch() -> None:
    scenes = sample_scenes(12, seed=7, split="all")
    pixels, mask = render(scenes, SIZE)
    again, _ = render(sample_scenes(12, seed=7, split="all"), SIZE)
    backwards, _ = render(scenes[torch.arange(11, -1, -1)], SIZE)
    assert torch.equal(pixels, again)
    assert torch.allclose(pixels, backwards.flip(0), atol=1e-6)
    assert torch.allclose(pixels[3:4], render(scenes[3:4], SIZE)[0], atol=1e-6)
    assert pixels.shape == (12, 3, SIZE, SIZE) and mask.shape == (12, 1, SIZE, SIZE)
    assert pixels.abs().max() <= 1 and mask.min() >= 0 and mask.max() <= 1 + 1e-6
    assert not torch.equal(pixels, render(sample_scenes(12, seed=8, split="all"), SIZE)[0])


def test_every_object_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    _, mask = render(place(list(all_combinations()[::7]), generator), SIZE)
    assert mask.mean((1, 2, 3)).min() > 0.02


def test_the_changed_mask_holds_every_change() -> None:
    edits = sample_edits(4, seed=2)
    source, source_object = render(edits.source, SIZE)
    target, _ = render(edits.target, SIZE)
    changed = changed_mask(edits.source, edits.target, SIZE)
    assert changed.dtype == torch.bool and changed.shape == (len(source), 1, SIZE, SIZE)
    difference = (source - target).abs().amax(1, keepdim=True) / 2
    assert difference[~changed].max() <= 0.04
    assert changed.flatten(1).any(1).all()
    for i, kind in enumerate(edits.kind):
        if kind in ("colour", "pattern"):  # only the object, grown by a pixel
            near = torch.nn.functional.max_pool2d(source_object[i : i + 1], 3, 1, 1) > 0
            assert not (changed[i] & ~near[0]).any()
        if kind == "background":
            assert changed[i].float().mean() > 0.4
    assert not changed_mask(edits.source, edits.source, SIZE).any()
