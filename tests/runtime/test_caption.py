"""METHOD item 2: the prefix, with a captioner that says what it is told; and `generate` by its defaults, unwarned."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import BatchFeature

from forgedit.stages.caption import caption_photo


class Saying:
    """Captioner and processor in one."""

    device = "cpu"
    text_decoder = SimpleNamespace(generation_config=SimpleNamespace(max_length=7, max_new_tokens=None))

    def __init__(self, words: str) -> None:
        self.words = words

    def __call__(self, images: Image.Image, return_tensors: str) -> BatchFeature:
        return BatchFeature({})

    def generate(self) -> list[list[int]]:
        return [[0]]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.words


@pytest.mark.parametrize(
    "words, target, expected",
    [
        ("a cat ", "a dog", "a cat"),
        ("a cat", "A photo of a dog", "A photo of a cat"),
        ("a cat", "a photo of a dog", "a cat"),
        ("a photo of a cat", "A photo of a dog", "a photo of a cat"),
    ],
)
def test_prefix_follows_the_target_and_is_never_doubled(words, target, expected):
    speaker = Saying(words)
    assert caption_photo(Image.new("RGB", (8, 8)), speaker, speaker, target) == expected


@pytest.mark.parametrize("setting, value", [(None, None), ("max_length", 4), ("max_new_tokens", 5)])
def test_captions_are_as_long_as_by_default_and_nothing_warns(editor, monkeypatch, setting, value):
    """Random weights seldom end a sentence, so the length shows: 21 tokens where the model's folder says nothing."""
    captioner, processor = editor.model.captioner, editor.model.processor
    decoder = captioner.text_decoder
    monkeypatch.setattr(decoder.generation_config, "eos_token_id", None)
    monkeypatch.setattr(captioner.config.text_config, "sep_token_id", 16)  # an end that is hardly ever said
    if setting is not None:
        monkeypatch.setattr(decoder.generation_config, setting, value)
    photo = Image.radial_gradient("L").convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = captioner.generate(**processor(images=photo, return_tensors="pt"))[0]
    said = []
    generate = captioner.generate
    monkeypatch.setattr(captioner, "generate", lambda **settings: said.append(generate(**settings)) or said[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caption_photo(photo, captioner, processor)
    assert torch.equal(said[0][0], default)
    assert len(default) == {None: 21, "max_length": 4, "max_new_tokens": 6}[setting]
