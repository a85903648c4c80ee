"""The scorer's training: where it starts, what a batch holds, what the loss asks; and how it is examined."""

import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from bench.world import clip as C
from bench.world.captioner import build_captioner, normalised
from bench.world.pool import Pool
from forgedit.model.load import BUNDLED
from forgedit.model.scorer import load_scorer
from forgedit.world.render import render
from forgedit.world.scene import ATTRIBUTES, KINDS, all_combinations, caption, sample_scenes, targets_of
from forgedit.world.score import to_images

TRAIN = all_combinations("train")
SCENES, TRIPS = 2500, 300


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer")


@pytest.fixture(scope="module")
def lessons(tokenizer):
    """Pictures of one pixel that tell their combination, and by the sign of the last value whether they are renders."""
    scenes = sample_scenes(SCENES, 5)
    number = torch.tensor([TRAIN.index(c) for c in scenes.combinations()])
    pixels = torch.stack([number // 256, number % 256, torch.full_like(number, 255)], 1).to(torch.uint8)[
        ..., None, None
    ]
    trips = pixels[:TRIPS].clone()
    trips[:, 2] = 0
    return C.lessons(Pool(scenes, pixels, pixels[:, :1]), trips, tokenizer)


def test_the_vision_tower_starts_as_the_captioners(tokenizer):
    torch.manual_seed(0)
    clip, captioner = C.build_clip(tokenizer).eval(), build_captioner().eval()
    nn.init.normal_(captioner.vision_model.embeddings.patch_embedding.bias)
    C.start_from_captioner(clip, captioner)
    pixels = torch.randn(2, 3, 64, 64)
    clip.vision_model.pre_layrnorm = nn.Identity()  # the one thing that BLIP has not
    with torch.no_grad():
        ours = clip.vision_model.post_layernorm(clip.vision_model(pixel_values=pixels).last_hidden_state)
        theirs = captioner.vision_model(pixel_values=pixels).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_one_attribute_apart_is_what_edits_are():
    apart = C.one_attribute_apart(TRAIN)
    for i in range(0, len(TRAIN), 90):
        near = {kind: [TRAIN.index(c) for c in targets_of(TRAIN[i], kind, "train")] for kind in KINDS}
        near = {kind: found for kind, found in near.items() if found}
        assert sorted(j for found in near.values() for j in found) == apart[i].nonzero()[:, 0].tolist()
        for found in near.values():
            assert apart[i, found].sum().item() == pytest.approx(1.0)  # of equal weight, however many


def test_a_batch(lessons, tokenizer):
    n = 40
    pixels, shown, ids, named = C.draw(lessons, n, torch.Generator().manual_seed(1))
    told = ((pixels[:, :2, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(told[:, 0] * 256 + told[:, 1], shown)  # the pictures are of the combinations
    assert (pixels[: n // 2, 2] == -1).all() and (pixels[n // 2 :, 2] == 1).all()  # round trips, then renders
    assert (C.one_attribute_apart(TRAIN)[shown[: n // 2], shown[n // 2 :]] > 0).all()
    assert len(named.unique()) == len(named) > n and set(shown.tolist()) <= set(named.tolist())
    written = tokenizer.batch_decode(ids, skip_special_tokens=True)
    plain = [caption(TRAIN[i]) for i in named.tolist()]
    assert [words.removeprefix("a photo of ") for words in written] == plain
    assert 0 < sum(words.startswith("a photo of ") for words in written) < len(written)


def test_no_batch_knows_held_out_combinations(lessons):
    assert lessons.ids.shape[1] == len(TRAIN) and lessons.combination.max() < len(TRAIN)


def test_the_loss_without_doubles_is_clips():
    generator = torch.Generator().manual_seed(0)
    images, texts = (nn.functional.normalize(torch.randn(5, 8, generator=generator), dim=1) for _ in range(2))
    logits, order = 7.0 * images @ texts.T, torch.arange(5)
    expected = (nn.functional.cross_entropy(logits, order) + nn.functional.cross_entropy(logits.T, order)) / 2
    found = C.contrastive(images, texts, torch.tensor(7.0), torch.eye(5, dtype=torch.bool))
    assert torch.allclose(found, expected, atol=1e-6)


def test_equal_captions_are_all_right_and_a_caption_alone_stands_against():
    texts = torch.eye(3)
    images, same = texts[[0, 0, 1]], torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0]]).bool()
    scale = torch.tensor(50.0)
    assert C.contrastive(images, texts, scale, same) < 1e-6
    doubles_are_wrong = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0]]).bool()
    assert C.contrastive(images, texts, scale, doubles_are_wrong) > 0.1
    assert C.contrastive(images, texts[[0, 1, 0]], scale, same) > 0.1  # the third caption, of no picture, is as near


def test_a_few_steps_learn(lessons, tokenizer):
    torch.manual_seed(0)
    clip = C.build_clip(tokenizer)
    scenes = sample_scenes(8, 0)
    pixels = normalised(render(scenes)[0])
    ids = tokenizer([caption(c) for c in scenes.combinations()], padding=True, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(clip.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        images, texts = C.unit(clip.get_image_features(pixels)), C.unit(clip.get_text_features(ids))
        losses.append(C.contrastive(images, texts, clip.logit_scale.exp(), torch.eye(8, dtype=torch.bool)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_the_saved_folder_is_a_scorer_that_sees_what_training_sees(tokenizer, tmp_path):
    torch.manual_seed(0)
    clip = C.build_clip(tokenizer).eval()
    scenes = sample_scenes(3, 0)
    pixels = render(scenes)[0]
    with torch.no_grad():
        seen = C.unit(clip.get_image_features(normalised(pixels)))
    C.save_clip(clip, tokenizer, tmp_path / "scorer")
    scorer = load_scorer(tmp_path / "scorer")
    assert torch.allclose(scorer.embed_images(to_images(pixels)), seen, atol=5e-3)  # float16 weights, 8-bit pictures


class Knowing:
    """Attributes one-hot; pictures are those of the scenes, in order. What it is blind to is the same everywhere."""

    name = "knowing"

    def __init__(self, scenes, blind=()):
        self.scenes, self.blind = scenes, blind

    def rows(self, combinations):
        table = torch.tensor(combinations)
        table[:, [ATTRIBUTES.index(name) for name in self.blind]] = 0
        return nn.functional.normalize(nn.functional.one_hot(table, 9).flatten(1).float(), dim=1)

    def embed_images(self, images):
        return self.rows(self.scenes.combinations())

    def embed_texts(self, texts):
        by_caption = {f"a photo of {caption(c)}": c for c in all_combinations()}
        return self.rows([by_caption[words] for words in texts])


@pytest.mark.parametrize("blind", [(), ("colour",), ("pose", "background")])
def test_the_examination_finds_what_a_scorer_does_not_see(blind):
    scenes = sample_scenes(60, 1, "heldout")
    for name, hits in C.chosen(Knowing(scenes, blind), [], scenes).items():
        assert len(hits) > 5 and hits.float().mean() == (name not in blind), name
