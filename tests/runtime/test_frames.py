"""A sequence of frames under one noise, against a naive transcription with diffusers' modules."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from forgedit import EditConfig, InputError, TuneConfig
from forgedit.engine.batch import Leg
from forgedit.engine.sampler import ddim_schedule
from forgedit.evaluate.baselines import photo_latents
from forgedit.experimental import edit_frames
from tests.runtime import naive

CAPTION, TARGET = "a cat", "a blue dog"
TUNE = TuneConfig(num_steps=3, batch_size=2, unet_lr=1e-3, seed=3, caption=CAPTION)
EDIT = EditConfig(num_steps=10, guidance_scale=3.0, seed=4, strategy="encoderattn", gamma=1.2)
NEAR = 1e-5  # relative, of latents


def apart(got, expected):
    return float((got.detach() - expected.detach()).norm() / expected.detach().norm())


@pytest.fixture(scope="module", params=["exact", "reference"])
def session(request, editor, reference_editor, photo):
    return {"exact": editor, "reference": reference_editor}[request.param].tune(photo, TUNE)


@pytest.fixture(scope="module")
def frames(photo):
    """The photo, and two in which it has moved to the side."""
    pixels = np.asarray(Image.open(photo))
    return [Image.fromarray(np.roll(pixels, shift, axis=1)) for shift in (0, 5, 10)]


@torch.no_grad()
def naively(pipe, session, frames, strength, config=EDIT, noises=None):
    """Each frame's latents under the same noise, or one of noises each, denoised as an edit is."""
    unet = copy.deepcopy(pipe.unet)
    for name, weight in unet.named_parameters():
        if not naive.STRATEGIES[config.strategy](name):
            weight.data = session.tuned.get(f"unet.{name}", weight).clone()
    source, target = session.embedding, naive.embed(pipe, TARGET, naive.METHOD)
    if config.blend == "vs":
        edit = naive.blend_vs(source, target, config.gamma, naive.METHOD)
    else:
        edit = naive.blend_vp(source, target, config.identity_weight, config.edit_weight, naive.METHOD)
    both = torch.cat([naive.embed(pipe, "", naive.METHOD), edit])
    ddim: DDIMScheduler = naive.scheduler(naive.METHOD)
    ddim.set_timesteps(config.num_steps)
    timesteps, made = ddim.timesteps[-round(strength * config.num_steps) :], []
    for index, frame in enumerate(frames):
        resized = frame.convert("RGB").resize(session.source.size, Image.Resampling.LANCZOS)
        z = naive.first_latents(pipe, resized, torch.Generator().manual_seed(TUNE.seed), naive.METHOD)
        seed = config.seed if noises is None else noises[index]
        x = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
        x = ddim.add_noise(z, x, timesteps[:1])
        for t in timesteps:
            u, c = unet(torch.cat([x, x]), t, both).sample.chunk(2)
            x = ddim.step(u + config.guidance_scale * (c - u), t, x).prev_sample
        made.append(x)
    return torch.cat(made)


@pytest.mark.parametrize(
    "change",
    [{}, {"strategy": "none", "gamma": 0.7}, {"blend": "vp", "identity_weight": 0.9, "edit_weight": 1.3}],
    ids=["vs", "none", "vp"],
)
def test_frames(pipe, session, frames, change):
    config = replace(EDIT, **change)
    made = edit_frames(session, frames, TARGET, config, strength=0.6)
    assert apart(made.latents, naively(pipe, session, frames, 0.6, config)) < NEAR
    assert [picture.size for picture in made.images] == [session.source.size] * 3
    assert [picture.size for picture in made.at_frame_size()] == [frames[0].size] * 3
    assert made.frame_size == frames[0].size and made.seconds.keys() == {"forget", "sample", "decode"}
    # each frame with a noise of its own, or another strength, is not it
    assert apart(made.latents, naively(pipe, session, frames, 0.6, config, noises=(4, 5, 6))) > 0.05
    assert apart(made.latents, naively(pipe, session, frames, 0.7, config)) > 0.05


def test_frames_that_are_alike_come_out_alike(session, frames):
    made = edit_frames(session, [frames[0]] * 3, TARGET, EDIT)
    assert apart(made.latents[1], made.latents[0]) < NEAR and apart(made.latents[2], made.latents[0]) < NEAR


def test_the_learned_photo_enters_with_the_latents_that_were_learned(session, frames):
    """Of hardly any strength nothing but the noise of timestep 0 is added, 0.029 of a standard deviation."""
    made = edit_frames(session, frames[:1], TARGET, EDIT, strength=1e-3)
    assert 0.02 < float((made.latents - photo_latents(session)).std()) < 0.04
    assert torch.equal(session.editor.encode(session, [session.source]), photo_latents(session))


def test_full_strength_is_the_edit_for_every_frame(session, frames):
    made = edit_frames(session, frames[:2], TARGET, EDIT, strength=1.0)
    edit = session.edit(TARGET, EDIT)
    assert apart(made.latents, edit.latents.expand_as(made.latents)) < NEAR


def test_strength_counts(session, frames):
    latents = session.editor.encode(session, [session.source])
    moved = [
        float((edit_frames(session, frames[:1], TARGET, EDIT, strength=s).latents - latents).norm())
        for s in (0.2, 0.5, 0.9)
    ]
    assert moved[0] < moved[1] < moved[2]


def test_as_many_frames_together_as_edits(editor, photo, frames, monkeypatch):
    session, seen = editor.tune(photo, TUNE), []
    whole = edit_frames(session, frames, TARGET, EDIT, 0.5, on_step=seen.append)
    assert [(e.step, e.total) for e in seen if e.stage == "sample"] == [(step, 5) for step in range(1, 6)]
    monkeypatch.setattr(editor._path, "_most", 2)
    seen.clear()
    parts = edit_frames(session, frames, TARGET, EDIT, 0.5, on_step=seen.append)
    assert [(e.step, e.total) for e in seen if e.stage == "sample"] == [(step, 10) for step in range(1, 11)]
    assert apart(parts.latents, whole.latents) < NEAR and len(parts.images) == 3


def test_a_transparent_frame_is_seen_on_white(session, frames):
    clear = frames[1].convert("RGBA")
    clear.putalpha(0)
    white = Image.new("RGB", clear.size, "white")
    one, other = (edit_frames(session, [frame], TARGET, EDIT, 0.3) for frame in (clear, white))
    assert torch.equal(one.latents, other.latents) and one.images[0].mode == "RGB"


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_an_impossible_strength(session, frames, strength):
    with pytest.raises(ValueError, match="strength"):
        edit_frames(session, frames, TARGET, EDIT, strength)


def test_what_is_refused(session, frames):
    with pytest.raises(InputError, match="no frame"):
        edit_frames(session, [], TARGET, EDIT)
    with pytest.raises(InputError, match="frame 2 has 30 by 30 pixels, the photo that was learned 60 by 30"):
        edit_frames(session, [frames[0], frames[1].crop((0, 0, 30, 30))], TARGET, EDIT)
    with pytest.raises(InputError, match="target prompt is empty"):
        edit_frames(session, frames, " ", EDIT)
    with pytest.raises(ValueError, match="'ddim' alone"):
        edit_frames(session, frames, TARGET, replace(EDIT, scheduler="unipc"))
    with pytest.raises(ValueError, match="a picture has size"):
        session.editor.encode(session, [frames[0].resize((30, 30))])


def test_several_rows_have_no_one_picture(session):
    schedule = ddim_schedule(session.editor.model.alphas_cumprod, 2, "epsilon")
    latents = session.editor.encode(session, [session.source] * 2)
    made = session.editor.travel(session, latents, [Leg(schedule, None, 1.0)])
    assert len(made.images) == len(made.latents) == 2
    with pytest.raises(ValueError):
        made.image  # noqa: B018


def test_it_is_marked_experimental():
    assert edit_frames.__module__.startswith("forgedit.experimental")
