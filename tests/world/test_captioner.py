"""The captioner: shapes, offline loading, and that default `generate` starts and ends as it was trained."""

import pytest
import torch
from PIL import Image

from bench.world.captioner import (
    MAX_TOKENS,
    build_captioner,
    build_processor,
    describe,
    load_captioner,
    normalised,
    save_captioner,
    vocabulary,
)
from forgedit.stages.caption import caption_photo
from forgedit.world.render import render
from forgedit.world.scene import all_combinations, caption, sample_scenes
from forgedit.world.score import to_images, to_pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("captioner")
    save_captioner(build_captioner(), path)
    return path


def test_size_and_forward() -> None:
    captioner = build_captioner()
    assert sum(p.numel() for p in captioner.parameters()) <= 1.2e6
    words = build_processor().tokenizer(["a photo of a red ball on sand"], return_tensors="pt").input_ids
    output = captioner(pixel_values=torch.zeros(1, 3, 64, 64), input_ids=words, labels=words)
    assert output.logits.shape == (1, words.shape[1], len(vocabulary())) and output.loss.isfinite()


def test_the_decoder_does_not_see_the_future() -> None:
    torch.manual_seed(0)
    captioner, pixels = build_captioner().eval(), torch.zeros(1, 3, 64, 64)
    words = torch.tensor([[2, 7, 8, 9, 10]])
    other = words.clone()
    other[0, -1] = 11
    first, second = (captioner(pixel_values=pixels, input_ids=w).logits[:, :-1] for w in (words, other))
    assert torch.allclose(first, second, atol=1e-6)


def test_every_caption_is_whole_words_and_fits() -> None:
    tokenizer = build_processor().tokenizer
    for combination in all_combinations():
        text = f"a photo of {caption(combination)}"
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split()) + 2 <= MAX_TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_folder_loads_offline_and_generates(folder) -> None:
    captioner, processor = load_captioner(folder)
    assert captioner.dtype == torch.float32 and not captioner.training
    images = to_images(render(sample_scenes(2, 0))[0])
    inputs = processor(images=images, return_tensors="pt")
    ids = captioner.generate(**inputs)
    assert (ids[:, 0] == processor.tokenizer.cls_token_id).all()
    assert captioner.config.text_config.sep_token_id == processor.tokenizer.sep_token_id
    assert describe(captioner, processor, images)[0] == caption_photo(images[0], captioner, processor)


def test_training_sees_what_the_processor_makes(folder) -> None:
    _, processor = load_captioner(folder)
    images = to_images(render(sample_scenes(2, 0))[0])
    made = processor(images=images, return_tensors="pt").pixel_values
    assert torch.allclose(made, normalised(to_pixels(images)), atol=1e-5)
    large = Image.new("RGB", (200, 130), "red")
    assert processor(images=large, return_tensors="pt").pixel_values.shape == (1, 3, 64, 64)


def test_a_few_steps_learn(folder) -> None:
    torch.manual_seed(0)
    captioner, tokenizer = build_captioner(), build_processor().tokenizer
    optimizer = torch.optim.AdamW(captioner.parameters(), 2e-3)
    pixels = normalised(render(sample_scenes(1, 0))[0])
    words = tokenizer("a photo of a red ball on sand", return_tensors="pt").input_ids
    for _ in range(30):
        loss = captioner(pixel_values=pixels, input_ids=words, labels=words).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = captioner.eval().generate(pixel_values=pixels)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a photo of a red ball on sand"
