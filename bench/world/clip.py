"""The bundled scorer: a small CLIP of the world's renders and captions, and what it reads in them.

CLIPModel in transformers' layout: a vision transformer of 4 layers on 8-pixel patches, a text tower of 2 layers over
the bundled tokenizer. Its vision tower starts from the bundled captioner's, as shapes are what a small one learns last;
the judge has no part in it. Half the pictures of a batch have been through the autoencoder, as edits have, and each of
the other half differs from one of them in one attribute; so do three captions for every picture: what a scorer of edits
has to tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from bench.world import pool, text
from bench.world.captioner import SIZE, WIDTH, load_captioner, normalised
from bench.world.judge import augment, round_trips
from bench.world.loop import Loss, Plan
from forgedit.quality.agreement import Scorer, similarity
from forgedit.world.judge import applies
from forgedit.world.scene import ATTRIBUTES, Combination, Scenes, all_combinations, caption, targets_of

TEXT_WIDTH = 64
PROJECTION = 64
SIMILAR_CAPTIONS = 3  # for every picture of a batch
POSED_ODDS = 1.6  # how much more often a picture whose object has a pose is drawn


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """0.80 M parameters, for pictures of 64 pixels; the text tower takes 77 tokens."""
    towers = {"num_attention_heads": 4, "hidden_act": "gelu"}
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4, "image_size": SIZE}
    words = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "num_hidden_layers": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPModel(
        CLIPConfig(
            vision_config=vision | towers | {"patch_size": 8},
            text_config=words | towers | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
            projection_dim=PROJECTION,
        )
    )


@torch.no_grad()
def start_from_captioner(clip: CLIPModel, captioner: Any) -> None:
    """Write a BLIP's vision tower into a CLIP's of the same shape.

    What CLIP has not, the patches' bias, goes into the positions; what BLIP has not, a norm before the layers, starts
    at the scale that BLIP's patches have there.
    """
    theirs, ours = captioner.vision_model, clip.vision_model
    weights = {}
    for name, weight in theirs.state_dict().items():
        if name.endswith(("qkv.weight", "qkv.bias")):
            stem, kind = name.split("qkv.")
            weights |= {f"{stem}{part}_proj.{kind}": w for part, w in zip("qkv", weight.chunk(3), strict=True)}
        elif not name.startswith("embeddings."):
            weights[name.replace("self_attn.projection", "self_attn.out_proj")] = weight
    places = theirs.embeddings.position_embedding[0].clone()
    places[1:] += theirs.embeddings.patch_embedding.bias
    weights["embeddings.class_embedding"] = theirs.embeddings.class_embedding[0, 0]
    weights["embeddings.patch_embedding.weight"] = theirs.embeddings.patch_embedding.weight
    weights["embeddings.position_embedding.weight"] = places
    weights["pre_layrnorm.weight"] = torch.full_like(ours.pre_layrnorm.weight, 2.7)
    weights["pre_layrnorm.bias"] = torch.zeros_like(ours.pre_layrnorm.bias)
    ours.load_state_dict(weights)


def one_attribute_apart(combinations: tuple[Combination, ...]) -> Tensor:
    """Odds of drawing combination j beside i, float32 [N, N]: 0 unless one attribute differs; the kinds equally often.

    Another object may have another pose, as it does in scene.targets_of.
    """
    table = torch.tensor(combinations)
    differs = table[:, None] != table[None]
    thing, pose = ATTRIBUTES.index("object"), ATTRIBUTES.index("pose")
    differs[..., pose] &= ~differs[..., thing]
    apart = differs & (differs.sum(-1, keepdim=True) == 1)
    return (apart / apart.sum(1, keepdim=True).clamp(min=1)).sum(-1)


@dataclass(frozen=True)
class Lessons:
    """What batches are drawn from. N combinations, P pool pictures, R of them also as round trips.

    ids: int64 [2, N, tokens], captions with and without 'a photo of '; combination: int64 [P], of each picture
    order: int64 [P], the pictures by combination; first, count: int64 [N], where a combination's begin and how many
    apart: as one_attribute_apart gives it, among combinations that have pictures; odds: float32 [R]
    """

    pictures: pool.Pool
    trips: Tensor
    ids: Tensor
    combination: Tensor
    order: Tensor
    first: Tensor
    count: Tensor
    apart: Tensor
    odds: Tensor


def lessons(pictures: pool.Pool, trips: Tensor, tokenizer: CLIPTokenizer) -> Lessons:
    """trips: uint8 [R, 3, S, S], the pool's first pictures' round trips."""
    combinations = all_combinations("train")
    place = {c: i for i, c in enumerate(combinations)}
    combination = torch.tensor([place[c] for c in pictures.scenes.combinations()])
    count = torch.bincount(combination, minlength=len(combinations))
    written = [prefix + caption(c) for prefix in text.PREFIXES for c in combinations]
    ids = tokenizer(written, padding="longest", return_tensors="pt").input_ids
    posed = applies(pictures.scenes.object[: len(trips)], "pose")
    return Lessons(
        pictures=pictures,
        trips=trips,
        ids=ids.view(2, len(combinations), -1),
        combination=combination,
        order=combination.argsort(stable=True),
        first=count.cumsum(0) - count,
        count=count,
        apart=one_attribute_apart(combinations) * (count > 0),
        odds=torch.where(posed, POSED_ODDS, 1.0),
    )


def draw(source: Lessons, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch: pixels [n, 3, S, S] in [-1, 1] and their combinations [n]; captions' ids [T, L] and theirs [T].

    The pictures' second half are renders, each one attribute apart from a round trip in the first half. The captions
    are all different; every picture's own is among them.
    """
    first = torch.multinomial(source.odds, n // 2, replacement=True, generator=generator)
    beside = torch.multinomial(source.apart[source.combination[first]], 1, generator=generator)[:, 0]
    within = (torch.rand(len(beside), generator=generator) * source.count[beside]).long()
    second = source.order[source.first[beside] + within]
    pixels = torch.cat([source.trips[first].float() / 127.5 - 1, source.pictures.batch(second)[0]])
    shown = torch.cat([source.combination[first], beside])
    similar = torch.multinomial(source.apart[shown], SIMILAR_CAPTIONS, generator=generator)
    named = torch.cat([shown, similar.flatten()]).unique()
    prefix = torch.randint(2, (len(named),), generator=generator)
    return pixels, shown, source.ids[prefix, named], named


def contrastive(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """The mean of both directions' cross-entropies, where every pair that belongs together is right.

    images: [B, D], texts: [T, D], unit rows; scale: scalar, the inverse temperature
    same: bool [B, T], whether picture and caption belong together; a caption of no picture only stands against others
    Source: Radford et al. 2021, arXiv 2103.00020, with several positives a row
    """
    logits = scale * images @ texts.T
    missed = torch.zeros((), device=logits.device)
    for rows, positive in ((logits, same), (logits.T, same.T)):
        rows, positive = rows[positive.any(1)], positive[positive.any(1)]
        right = rows.masked_fill(~positive, -torch.inf).logsumexp(1)
        missed = missed + (rows.logsumexp(1) - right).mean() / 2
    return missed


def unit(features: Any) -> Tensor:
    """Unit rows of what transformers' get_image_features or get_text_features give: [B, D]."""
    return nn.functional.normalize(features.pooler_output, dim=1)


def _loss(
    clip: CLIPModel, source: Lessons, device: str, n: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    pixels, shown, ids, named = draw(source, n, generator)
    images = unit(clip.get_image_features(pixel_values=normalised(augment(pixels, generator)).to(device)))
    texts = unit(clip.get_text_features(input_ids=ids.to(device)))
    same = (shown[:, None] == named[None]).to(device)
    best = (images @ texts.T).argmax(1, keepdim=True)
    scale = clip.logit_scale.exp().clamp(max=100)
    return contrastive(images, texts, scale, same), {"right": float(same.gather(1, best).float().mean())}


def build(plan: Plan, data: Path, vae: Path, model: Path) -> tuple[nn.Module, Loss]:
    """For loop.launch. vae: as judge.load_vae reads it; model: the folder whose tokenizer/ and captioner/ to take."""
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    torch.manual_seed(plan.seed)
    clip, pictures = build_clip(tokenizer), pool.load(data)
    start_from_captioner(clip, load_captioner(model / "captioner")[0])
    trips = round_trips(vae, pictures, plan.folder / f"{plan.name}-round-trips.pt", plan.device)
    return clip, partial(_loss, clip, lessons(pictures, trips, tokenizer), plan.device)


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Weights in float16 safetensors, tokenizer and preprocessing: what `load_scorer(folder)` reads. Casts in place."""
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size=side, do_center_crop=False).save_pretrained(folder)


def export(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Save the averaged weights of a training checkpoint. tokenizer: the bundled one's folder."""
    words = CLIPTokenizer.from_pretrained(tokenizer)
    clip = build_clip(words)
    clip.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"])
    save_clip(clip, words, folder)


def chosen(scorer: Scorer, images: list[Image.Image], scenes: Scenes) -> dict[str, Tensor]:
    """By attribute, bool over the pictures where it applies: of the captions that differ from the scene's in this
    attribute alone, the nearest one says what the scene says."""
    every = all_combinations()
    seen = scorer.embed_images(images)
    told = dict(zip(every, scorer.embed_texts([f"a photo of {caption(c)}" for c in every]), strict=True))
    combinations, found = scenes.combinations(), {}
    for name in ATTRIBUTES:
        hits = []
        for row in applies(scenes.object, name).nonzero()[:, 0].tolist():
            own = combinations[row]
            others = torch.stack([told[c] for c in targets_of(own, name, "all")])
            hits.append(bool(similarity(seen[row], told[own]) > similarity(seen[row], others).max()))
        found[name] = torch.tensor(hits)
    return found
