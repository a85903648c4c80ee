"""Pairs of held-out photos and edits."""

from collections import Counter

import pytest
import torch

from bench.world.pairs import pairs_by_photo
from forgedit.world.scene import ATTRIBUTES, KINDS, is_held_out


def test_edits_of_a_photo_stand_together_and_all_is_held_out():
    edits = pairs_by_photo(photos=40, each=3, seed=0)
    assert len(edits.kind) == len(edits.source) == len(edits.target) == 120
    sources, targets = edits.source.combinations(), edits.target.combinations()
    assert all(map(is_held_out, [*sources, *targets]))
    for photo in range(0, 120, 3):
        same = slice(photo, photo + 3)
        assert len(set(sources[same])) == 1 and len(set(targets[same])) == 3
        for where in ("x", "y", "size", "angle", "light", "noise_seed"):
            values = getattr(edits.source, where)[same]
            assert (values == values[0]).all() and torch.equal(getattr(edits.target, where)[same], values)


def test_a_pair_differs_in_what_its_kind_says():
    edits = pairs_by_photo(photos=30, each=2, seed=1)
    assert set(edits.kind) == set(KINDS)
    for kind, source, target in zip(edits.kind, edits.source.combinations(), edits.target.combinations(), strict=True):
        changed = {name for name, one, other in zip(ATTRIBUTES, source, target, strict=True) if one != other}
        assert changed == {kind} or (kind == "object" and changed == {"object", "pose"})


def test_seeds_draw_other_scenes_and_kinds_are_spread():
    one, other = pairs_by_photo(20, 3, 0), pairs_by_photo(20, 3, 1)
    assert not set(one.source.noise_seed.tolist()) & set(other.source.noise_seed.tolist())
    assert torch.equal(pairs_by_photo(20, 3, 0).source.noise_seed, one.source.noise_seed)
    had = Counter(one.kind)
    assert len(had) == len(KINDS) and max(had.values()) <= 25


@pytest.mark.parametrize("photos, each", [(0, 3), (3, 0), (1, 6)])
def test_what_cannot_be_had_is_refused(photos, each):
    with pytest.raises(ValueError, match="cannot be had; expected at least 1 of 1 to 5"):
        pairs_by_photo(photos, each, 0)
