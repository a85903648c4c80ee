"""METHOD item 2's prefix, with a captioner that says what it is told."""

import pytest
from PIL import Image
from transformers import BatchFeature

from forgedit.stages.caption import caption_photo


class Saying:
    """Captioner and processor in one."""

    device = "cpu"

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
