"""Held-out pairs of photo and edit, several edits of one photo: what is learned once serves them all."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from forgedit.world.scene import ATTRIBUTES, KINDS, Combination, Edits, all_combinations, place, targets_of


def pairs_by_photo(photos: int, each: int, seed: int) -> Edits:
    """`photos` times `each` pairs; those of one photo stand together, and share their source scene.

    A photo's edits go to different targets, of the kinds that were had least so far. Only scenes with that many
    held-out targets are taken: there are 82 combinations with two or more, 38 with three or more.
    Raises: ValueError if there are none
    """
    generator = torch.Generator().manual_seed(seed)
    targets = {
        source: found
        for source in all_combinations("heldout")
        if len(found := [(kind, target) for kind in KINDS for target in targets_of(source, kind)]) >= each
    }
    if photos < 1 or each < 1 or not targets:
        raise ValueError(f"{photos} photos of {each} edits each cannot be had; expected at least 1 of 1 to 5")
    had: Counter[str] = Counter()
    sources: list[Combination] = []
    wanted: list[list[tuple[str, Combination]]] = []
    order = torch.cat([torch.randperm(len(targets), generator=generator) for _ in range(-(-photos // len(targets)))])
    for index in order[:photos].tolist():
        source = list(targets)[index]
        left, taken = [targets[source][i] for i in torch.randperm(len(targets[source]), generator=generator)], []
        while len(taken) < each:
            taken.append(min(left, key=lambda found: had[found[0]]))
            left.remove(taken[-1])
            had[taken[-1][0]] += 1
        sources.append(source)
        wanted.append(taken)
    scenes = place(sources, generator)
    alike = [photo for photo in range(photos) for _ in range(each)]
    flat = [found for taken in wanted for found in taken]
    columns = torch.tensor([target for _, target in flat], dtype=torch.int64).unbind(1)
    source_scenes = scenes[alike]
    changed = replace(source_scenes, **dict(zip(ATTRIBUTES, columns, strict=True)))
    return Edits([kind for kind, _ in flat], source_scenes, changed)


def some_pairs(edits: Edits, rows: list[int]) -> Edits:
    """Those rows of the pairs."""
    return Edits([edits.kind[row] for row in rows], edits.source[rows], edits.target[rows])
