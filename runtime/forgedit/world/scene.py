"""What a picture of the rendered world says: attributes, captions, splits and edits.

A scene is a row of `Scenes`; a *combination* is its (object, pose, colour, pattern, background). One in eight is held
out by a hash (the poses of a thing together, so that pose edits have both ends): training never renders it, evaluation
renders nothing else. Position, size, angle, light and noise vary freely and stand in no caption: they are what an edit
must keep without being told.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

OBJECTS = ("ball", "cube", "cone", "star", "heart", "mug", "bird", "face", "flower")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
PATTERNS = ("plain", "striped", "dotted")
BACKGROUNDS = ("grass", "sand", "snow", "bricks", "wood", "night")
POSES = {"bird": ("folded wings", "open wings"), "face": ("smiling", "frowning"), "flower": ("closed", "open")}
PATTERNED = ("ball", "cube", "cone", "heart", "mug")
PLACES = {
    "grass": "on grass",
    "sand": "on sand",
    "snow": "on snow",
    "bricks": "in front of a brick wall",
    "wood": "in front of a wooden wall",
    "night": "in the night sky",
}
KINDS = ("colour", "pattern", "object", "background", "pose")
ATTRIBUTES = ("object", "pose", "colour", "pattern", "background")
HELD_OUT_ONE_IN = 8

Combination = tuple[int, int, int, int, int]
Split = Literal["train", "heldout", "all"]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes; every field has length B.

    object, pose, colour, pattern, background: int64, indices into the tuples above (pose 0 where the object has none)
    x, y: float32, the object's centre in [-1, 1], y down; size: float32, its radius in the same unit
    angle: float32, radians; light: float32 in [0, 1], how far from the left the light comes; noise_seed: int64
    """

    object: Tensor
    pose: Tensor
    colour: Tensor
    pattern: Tensor
    background: Tensor
    x: Tensor
    y: Tensor
    size: Tensor
    angle: Tensor
    light: Tensor
    noise_seed: Tensor

    def __len__(self) -> int:
        return len(self.object)

    def __getitem__(self, index: Tensor | slice | list[int]) -> Scenes:
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def combinations(self) -> list[Combination]:
        columns = (getattr(self, name).tolist() for name in ATTRIBUTES)
        return list(zip(*columns, strict=True))


def cat(parts: list[Scenes]) -> Scenes:
    """Join batches end to end."""
    return Scenes(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scenes)})


@dataclass(frozen=True)
class Edits:
    """Pairs that differ in one attribute and share everything else: kind[i] names it."""

    kind: list[str]
    source: Scenes
    target: Scenes


def has_pose(object_index: int) -> bool:
    return OBJECTS[object_index] in POSES


def has_pattern(object_index: int) -> bool:
    """True for objects that exist striped and dotted."""
    return OBJECTS[object_index] in PATTERNED


def is_held_out(combination: Combination) -> bool:
    """A fixed hash (splitmix64's finaliser) of the combination, so that the split needs no table."""
    value = 0x5851F42D
    thing, _, *others = combination
    for part in (thing, *others):
        value = (value * 31 + part + 1) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) % HELD_OUT_ONE_IN == 0


@cache
def all_combinations(split: Split = "all") -> tuple[Combination, ...]:
    """Every combination that exists, in a fixed order, of one split."""
    found = [
        (thing, pose, colour, pattern, ground)
        for thing in range(len(OBJECTS))
        for pose in range(2 if has_pose(thing) else 1)
        for colour in range(len(COLOURS))
        for pattern in range(len(PATTERNS) if has_pattern(thing) else 1)
        for ground in range(len(BACKGROUNDS))
    ]
    return tuple(c for c in found if split == "all" or is_held_out(c) == (split == "heldout"))


@cache
def _by_object(split: Split) -> tuple[tuple[Combination, ...], ...]:
    return tuple(tuple(c for c in all_combinations(split) if c[0] == thing) for thing in range(len(OBJECTS)))


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def place(combinations: list[Combination], generator: torch.Generator) -> Scenes:
    """Scenes of the given combinations with everything that captions leave out drawn at random."""
    n = len(combinations)
    thing, pose, colour, pattern, ground = (
        torch.tensor(combinations, dtype=torch.int64).reshape(n, len(ATTRIBUTES)).unbind(1)
    )
    return Scenes(
        object=thing,
        pose=pose,
        colour=colour,
        pattern=pattern,
        background=ground,
        x=_uniform(n, -0.32, 0.32, generator),
        y=_uniform(n, -0.18, 0.22, generator),
        size=_uniform(n, 0.42, 0.58, generator),
        angle=_uniform(n, -0.25, 0.25, generator),
        light=torch.rand(n, generator=generator),
        noise_seed=torch.randint(0, 2**31, (n,), generator=generator),
    )


def sample_scenes(n: int, seed: int, split: Split = "train") -> Scenes:
    """n scenes of a split, objects equally often, combinations of an object equally often."""
    generator = torch.Generator().manual_seed(seed)
    tables = _by_object(split)
    things = torch.randint(0, len(OBJECTS), (n,), generator=generator).tolist()
    picks = torch.rand(n, generator=generator, dtype=torch.float64).tolist()
    return place([tables[o][int(p * len(tables[o]))] for o, p in zip(things, picks, strict=True)], generator)


def caption(combination: Combination) -> str:
    """The canonical caption, without the prefix 'a photo of '."""
    thing, pose, colour, pattern, ground = combination
    name, hue, place_words = OBJECTS[thing], COLOURS[colour], PLACES[BACKGROUNDS[ground]]
    words = [hue, name] if PATTERNS[pattern] == "plain" else [PATTERNS[pattern], hue, name]
    after = ""
    if name == "bird":
        after = f" with {POSES[name][pose]}"
    elif name in POSES:
        words.insert(0, POSES[name][pose])
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{article} {' '.join(words)}{after} {place_words}"


def captions(scenes: Scenes, prefix: str = "a photo of ") -> list[str]:
    return [prefix + caption(combination) for combination in scenes.combinations()]


def targets_of(source: Combination, kind: str, split: Split = "heldout") -> list[Combination]:
    """Combinations of the split that differ from `source` in the one attribute `kind` (and what it entails)."""
    column = ATTRIBUTES.index(kind)
    found = []
    for c in all_combinations(split):
        if c[column] == source[column]:
            continue
        kept = [a for i, a in enumerate(ATTRIBUTES) if i != column and not (kind == "object" and a == "pose")]
        if all(c[ATTRIBUTES.index(a)] == source[ATTRIBUTES.index(a)] for a in kept):
            found.append(c)
    return found


def sample_edits(n_per_kind: int, seed: int, split: Split = "heldout") -> Edits:
    """n_per_kind edits of each kind whose source and target are both of the split.

    Raises: ValueError if a kind has no pair in the split
    """
    generator = torch.Generator().manual_seed(seed)
    kinds: list[str] = []
    sources: list[Combination] = []
    targets: list[Combination] = []
    for kind in KINDS:
        pairs = [(s, t) for s in all_combinations(split) for t in targets_of(s, kind, split)]
        if not pairs:
            raise ValueError(f"no {kind} edit in split {split!r}; expected at least one pair of combinations")
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for i in range(n_per_kind):
            source, target = pairs[order[i % len(pairs)]]
            kinds.append(kind)
            sources.append(source)
            targets.append(target)
    source_scenes = place(sources, generator)
    columns = torch.tensor(targets, dtype=torch.int64).unbind(1)
    changed = dict(zip(ATTRIBUTES, columns, strict=True))
    return Edits(kinds, source_scenes, replace(source_scenes, **changed))
