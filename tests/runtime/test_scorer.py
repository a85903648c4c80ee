"""The scorer: a CLIP folder read as transformers reads it, refused where it does not fit; and the bundled one."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from bench.world.clip import chosen
from forgedit import Editor, ModelError
from forgedit.model import load_model
from forgedit.model.load import BUNDLED
from forgedit.model.scorer import BATCH, load_scorer
from forgedit.world.render import render
from forgedit.world.scene import sample_scenes
from forgedit.world.score import to_images

TEXTS = ["a cat", "a photo of a dog on a very long road, " * 9, "", "a cat"]


def save_random(folder, words):
    """A CLIP of two thin towers over the tokenizer in `words`: 32 pixels, of which it sees the centre."""
    tokenizer = CLIPTokenizer.from_pretrained(words)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision, text = {"image_size": 32, "patch_size": 8}, {"vocab_size": len(tokenizer), "max_position_embeddings": 20}
    torch.manual_seed(3)
    clip = CLIPModel(CLIPConfig(vision_config=shape | vision, text_config=shape | ids | text, projection_dim=8))
    for module in (clip, tokenizer, CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)):
        module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(folder, tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("scorer") / "clip-tiny", folder / "tokenizer")


@pytest.fixture
def copy(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "clip")


@pytest.fixture(scope="module")
def pictures():
    """More than a batch, of sizes and shapes that differ."""
    rng = np.random.default_rng(0)
    sides = [(40, 32), (32, 32), (70, 33), (32, 55)]
    pixels = [rng.integers(0, 256, (*sides[i % len(sides)], 3)).astype(np.uint8) for i in range(BATCH + 3)]
    return [Image.fromarray(each) for each in pixels]


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_pictures_are_embedded_as_transformers_does(clip_folder, pictures):
    clip, preprocess = CLIPModel.from_pretrained(clip_folder), CLIPImageProcessorPil.from_pretrained(clip_folder)
    ours = load_scorer(clip_folder).embed_images(pictures)
    assert ours.shape == (len(pictures), 8) and ours.dtype == torch.float32 and not ours.requires_grad
    for row, picture in zip(ours, pictures, strict=True):
        with torch.no_grad():
            theirs = clip.get_image_features(**preprocess(images=picture, return_tensors="pt")).pooler_output[0]
        assert torch.allclose(row, theirs / theirs.norm(), atol=1e-6)


def test_texts_are_embedded_as_transformers_does(clip_folder):
    clip, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    ours = load_scorer(clip_folder).embed_texts(TEXTS)
    for row, words in zip(ours, TEXTS, strict=True):
        inputs = tokenizer(words, truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            theirs = clip.get_text_features(**inputs).pooler_output[0]
        assert torch.allclose(row, theirs / theirs.norm(), atol=1e-6)
    assert torch.allclose(ours[0], ours[3], atol=1e-6) and not torch.allclose(ours[0], ours[1], atol=1e-3)


def test_nothing_has_no_rows(clip_folder):
    scorer = load_scorer(clip_folder)
    assert scorer.embed_images([]).shape == scorer.embed_texts([]).shape == (0, 8)


def test_the_preprocessing_is_the_folders_own(copy, pictures):
    whole = load_scorer(copy).embed_images(pictures[:1])
    edit_json(copy / "preprocessor_config.json", size={"height": 32, "width": 32}, do_center_crop=False)
    squeezed = load_scorer(copy).embed_images(pictures[:1])
    edit_json(copy / "preprocessor_config.json", image_mean=[0.0, 0.0, 0.0])
    lighter = load_scorer(copy).embed_images(pictures[:1])
    assert not torch.allclose(whole, squeezed, atol=1e-4) and not torch.allclose(squeezed, lighter, atol=1e-4)


def test_the_name_follows_the_weights(copy):
    before = load_scorer(copy).name
    assert re.fullmatch(r"clip-[0-9a-f]{8}", before) and load_scorer(copy).name == before
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"logit_scale": weights["logit_scale"] + 1}, copy / "model.safetensors", {"format": "pt"})
    assert load_scorer(copy).name != before


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_words(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    save_file(weights | {name: weights[name][:7].clone()}, folder / "model.safetensors", {"format": "pt"})


def remove_words(folder):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)


def remove(name):
    return lambda folder: (folder / name).unlink()


def rewrite_json(name, **changes):
    return lambda folder: edit_json(folder / name, **changes)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (pickle_weights, r"only pickled weights \(pytorch_model\.bin\).*refused.*CLIPModel\.from_pretrained"),
        (cut_weights, "cannot be read"),
        (drop_a_weight, r"lacks 1 weights.*text_projection"),
        (cut_words, r"tokens, its text tower knows 7"),
        (remove_words, "no tokenizer"),
        (remove("model.safetensors"), "holds no weights"),
        (remove("config.json"), r"config\.json cannot be read"),
        (remove("preprocessor_config.json"), r"no preprocessor_config\.json"),
        (rewrite_json("config.json", model_type="siglip"), "is of type 'siglip'; expected 'clip'"),
        (rewrite_json("preprocessor_config.json", crop_size={"height": 24, "width": 24}), "24 by 24.*takes 32 by 32"),
        (rewrite_json("preprocessor_config.json", size={"depth": 3}), "preprocessing cannot be used"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_whole_clip_is_refused(copy, spoil, message):
    spoil(copy)
    with pytest.raises(ModelError, match=message):
        load_scorer(copy)


def test_a_model_folder_carries_its_scorer_and_reads_it_late(folder, clip_folder, tmp_path, monkeypatch):
    assert load_model(folder).scorer is None
    carrying = shutil.copytree(folder, tmp_path / "model")
    shutil.copytree(clip_folder, carrying / "scorer")
    monkeypatch.setattr(CLIPModel, "from_pretrained", None)
    model = load_model(carrying)
    assert model.describe()["scorer"] is True
    monkeypatch.undo()
    assert model.scorer is model.scorer
    assert model.scorer.name.startswith("scorer-")


def test_another_scorer_is_taken_by_name_and_refused_at_once(folder, clip_folder, tmp_path):
    editor = Editor.from_pretrained(folder, scorer=str(clip_folder))
    assert editor.model.scorer.name.startswith("clip-tiny-")
    with pytest.raises(ModelError, match="expected 'clip'"):
        Editor.from_pretrained(folder, scorer=folder / "text_encoder")
    with pytest.raises(ModelError, match="no scorer folder"):
        Editor.from_pretrained(folder, scorer=tmp_path / "none")


@pytest.fixture(scope="module")
def bundled():
    return load_scorer(BUNDLED / "scorer")


def test_the_bundled_scorer_is_small():
    assert sum(path.stat().st_size for path in (BUNDLED / "scorer").iterdir()) < 3e6


def test_the_bundled_scorer_reads_held_out_renders(bundled):
    """Generous floors on few scenes, of another seed than the model card's figures."""
    scenes = sample_scenes(80, 7, "heldout")
    for name, hits in chosen(bundled, to_images(render(scenes)[0]), scenes).items():
        assert hits.float().mean() >= 0.85, name
