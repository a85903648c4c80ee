"""When a photo is learned parked, what that is predicted to hold, and on a GPU what it does hold."""

import logging
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import BlipConfig, BlipForConditionalGeneration, CLIPTextConfig, CLIPTextModel

from bench import sd14
from forgedit import Editor, TuneConfig
from forgedit.engine.tune_plan import PassCost, Way, ladder, predicted_bytes
from forgedit.engine.tuner import Tuner
from forgedit.stages.tune import trainable_names
from tests.runtime.test_parking_engine import EDIT, PARKED, TUNE, equal, every, parks


def test_the_ladder_parks_before_it_computes_twice():
    ways = [(way.micro_batch, way.parked, way.checkpointing) for way in ladder(["lean"], 10, parkable=True)]
    assert ways == [
        (10, False, False), (5, False, False), (10, True, False), (5, True, False), (10, False, True), (5, False, True),
        (10, True, True), (5, True, True), (2, True, True), (1, True, True),
    ]  # fmt: skip


def test_parked_bytes_are_not_there_while_learning():
    trained = [torch.empty(1000)]
    count = partial(predicted_bytes, trained=trained, config=TUNE, latents=0, passing=PassCost(0, 10, 0.1))
    lasting = 1000 * (4 + 8)  # gradients and moments of mode exact
    assert count(Way("exact", 4, False), held=9000) == 9000 + lasting + 4000  # and what was learned
    assert count(PARKED, held=9000, parkable=8000) == 1000 + lasting + 40
    assert count(PARKED, held=90_000, parkable=80_000) == 90_000  # before and after it


def test_memory_bytes_choose_to_park(folder, photo, editor, caplog):
    plain, editor = editor.tune(photo, TUNE), parks(Editor.from_pretrained(folder))
    roomy = TUNE.replace(mode="exact", memory_bytes=10**12)
    editor.tune(photo, roomy)
    tuner = editor._path._tuner
    assert tuner.way == Way("exact", 4, False)
    unparked = tuner.predicted
    with caplog.at_level(logging.INFO, "forgedit"):
        session = editor.tune(photo, roomy.replace(memory_bytes=unparked - 1))
    assert tuner.way == PARKED and f"tune: {PARKED}; predicted at most: " in caplog.text and equal(session, plain)
    saved = editor._parking.num_bytes() + sum(w.nbytes for w in plain.tuned.values())
    assert unparked - saved <= tuner.predicted < unparked


def test_lean_in_8_gb_by_arithmetic():
    """Stable Diffusion 1.4 at 512 by 512, edits in bfloat16: 5.51 GB lie there while it learns, 2.49 are left.

    Nothing of this was measured on a GPU. For the pass 1.9 GB are allowed (CPU kernels take 1.54: docs/log.md), the
    last 0.5 GB are for CUDA's context and the libraries' workspaces, which no plan counts.
    """
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**sd14.UNET), AutoencoderKL(**sd14.VAE)
        text_encoder = CLIPTextModel(CLIPTextConfig(**sd14.TEXT))
        captioner = BlipForConditionalGeneration(BlipConfig(**sd14.CAPTIONER))
    sizes = {part: sum(w.numel() for w in part.parameters()) for part in (unet, vae, text_encoder, captioner)}
    originals = 4 * sum(sizes.values())
    weights = dict(unet.named_parameters())
    count = partial(
        predicted_bytes,
        trained=[weights[name] for name in trainable_names(weights, "official")],
        config=TuneConfig(),
        latents=4 * 64 * 64,
        held=originals + 2 * sizes[unet] + 2 * sizes[vae],  # the engine's own UNet and VAE
        parkable=originals,
    )
    least, smallest = Way("lean", 10, True, parked=True), PassCost(0, 0, 0.0)
    assert count(least, passing=PassCost(0, 190_000_000, 0.0)) <= 7.5e9
    assert count(least, passing=smallest) == pytest.approx(7.05e9, rel=0.01)  # before and after it, all is there
    # no other way of this ladder comes near, even without a pass; another mode needs more than a device of 8 GB has
    for way in ladder(["exact", "fast", "lean"], 10, parkable=True):
        if way.mode != "lean" or not way.parked:
            assert count(way, passing=smallest) > 9e9


# on a GPU


@pytest.mark.gpu
def test_on_a_gpu_a_photo_learned_parked_is_the_photo(folder, photo, monkeypatch, tmp_path):
    editor = Editor.from_pretrained(folder, "cuda")
    whole = editor.tune(photo, TUNE)
    monkeypatch.setattr(Tuner, "_ways", lambda self, inputs: [PARKED])
    held = []
    for _ in range(3):
        session = editor.tune(photo, TUNE)
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1] and {weight.device.type for weight in session.tuned.values()} == {"cpu"}
    assert all(torch.equal(session.tuned[name], weight.cpu()) for name, weight in whole.tuned.items())
    assert {weight.device.type for weight in every(editor).values()} == {"cuda"}
    assert torch.equal(session.edit("a dog", EDIT).latents, whole.edit("a dog", EDIT).latents)
    saved = [one.save(tmp_path / str(i), "int8").relative_error for i, one in enumerate((whole, session))]
    assert saved[0] == saved[1]
    loaded = editor.load_session(tmp_path / "1")
    assert {weight.device.type for weight in loaded.tuned.values()} == {"cuda"}


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_lean_learns_in_8_gb():
    """Stable Diffusion 1.4's shapes: the second photo, as the first one's plan is measured on the device."""
    editor = Editor(sd14.sd14_model("cuda"), numerics="fast", memory_bytes=8 * 10**9)
    photo = Image.effect_noise((512, 512), 60).convert("RGB")
    config = TuneConfig(caption="a cat", num_steps=3)
    editor.tune(photo, config)
    tuner, peaks = editor._path._tuner, []
    assert tuner.way.mode == "lean" and tuner.way.parked

    def watch(event):
        if event.stage == "encode":
            peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    torch.cuda.reset_peak_memory_stats()
    editor.tune(photo, config, on_step=watch)
    peaks.append(torch.cuda.max_memory_allocated())
    assert max(peaks) <= 8e9
    assert peaks[1] == pytest.approx(tuner.predicted, rel=0.15)
