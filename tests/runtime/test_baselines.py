"""Other methods on our engine against naive transcriptions of their papers, with diffusers' modules."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from forgedit import EditConfig, EditDiverged, Editor, TuneConfig
from forgedit.engine.batch import Leg
from forgedit.engine.learner import DTYPES, Learner
from forgedit.engine.sampler import ddim_schedule, inverted, last_steps
from forgedit.engine.tune_inputs import TuneInputs
from forgedit.engine.tune_plan import Way
from forgedit.evaluate.baselines import (
    BASELINES,
    Baseline,
    DreamBooth,
    FromNoise,
    Imagic,
    Inversion,
    SDEdit,
    Tuned,
    Unchanged,
    Untuned,
    photo_latents,
)
from forgedit.model.fuse import FusedUNet
from forgedit.stages.decode import decode_latents
from forgedit.stages.sample import ddim_step
from forgedit.world.render import render
from forgedit.world.scene import captions, sample_scenes
from forgedit.world.score import psnr, to_images, to_pixels
from tests.runtime import naive

CAPTION, TARGET = "a cat", "a blue dog"
TUNE = dict(num_steps=3, batch_size=2, unet_lr=1e-3, seed=3)
EDIT = EditConfig(num_steps=10, guidance_scale=3.0, seed=4)
NEAR = 1e-5  # relative, of latents
NEAR_INVERTED = 3e-5  # what was rounded on the way to the noise grows on the way back: 1.3e-5 on AVX2


def distance(got, expected):
    return float((got.detach() - expected.detach()).norm() / expected.detach().norm())


# schedules


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def schedules(request):
    """The noise schedule, its prediction type, 50 steps down, and the way back up."""
    alphas = naive.scheduler(naive.METHOD).alphas_cumprod
    down = ddim_schedule(alphas, 50, request.param)
    return alphas, request.param, down, inverted(down)


def test_a_step_down_and_back_up_is_the_identity(schedules):
    alphas, prediction_type, _, up = schedules
    latents, prediction = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for timestep, (kept, moved) in zip(up.timesteps.tolist(), up.coefficients.double().tolist(), strict=True):
        before, after = alphas.double()[timestep], alphas.double()[timestep - 20]
        down = ddim_step(latents, prediction, before, after, prediction_type)
        assert distance(kept * down + moved * prediction, latents) < 1e-6


def test_the_way_up_leaves_out_the_step_that_does_nothing(schedules):
    _, _, down, up = schedules
    assert down.timesteps.tolist() == list(range(980, -1, -20)) and down.idle == 1
    assert up.timesteps.tolist() == list(range(20, 981, 20)) and up.idle == 0


def test_the_last_steps_of_a_schedule(schedules):
    _, _, down, _ = schedules
    part = last_steps(down, 3)
    assert part.timesteps.tolist() == [40, 20, 0] and part.idle == 1
    assert torch.equal(part.coefficients, down.coefficients[-3:])
    for steps in (0, 51):
        with pytest.raises(ValueError, match=f"steps {steps} is out of range"):
            last_steps(down, steps)


# pictures, each against its paper


@pytest.fixture(scope="module", params=["exact", "reference"])
def path(request, editor, reference_editor):
    return {"exact": editor, "reference": reference_editor}[request.param]


@pytest.fixture(scope="module")
def session(path, photo):
    config = TuneConfig(caption=CAPTION, **TUNE)
    return path.tune(photo, config)


@pytest.fixture(scope="module")
def untuned(path, photo):
    return Untuned().learn(path, photo, CAPTION, TARGET)


@pytest.fixture
def travelled(monkeypatch):
    """Latents that Editor.travel came to."""
    seen, travel = [], Editor.travel

    def watch(*arguments, **named):
        seen.append(travel(*arguments, **named))
        return seen[-1]

    monkeypatch.setattr(Editor, "travel", watch)
    return seen


def forgotten(pipe, session, strategy):
    """diffusers' UNet with the session's weights, forgotten naively."""
    unet = copy.deepcopy(pipe.unet)
    for name, weight in unet.named_parameters():
        tuned = session.tuned.get(f"unet.{name}", weight)
        weight.data = weight.data if naive.STRATEGIES[strategy](name) else tuned.clone()
    return unet.requires_grad_(False)


def denoise(pipe, unet, x, timesteps, ddim):
    both = torch.cat([naive.embed(pipe, "", naive.METHOD), naive.embed(pipe, TARGET, naive.METHOD)])
    for t in timesteps:
        u, c = unet(torch.cat([x, x]), t, both).sample.chunk(2)
        x = ddim.step(u + EDIT.guidance_scale * (c - u), t, x).prev_sample
    return x


def ddim_of(steps):
    ddim: DDIMScheduler = naive.scheduler(naive.METHOD)
    ddim.set_timesteps(steps)
    return ddim


@torch.no_grad()
def invert_naively(unet, x, embedding, ddim):
    """As the baseline of Hertz et al.: the clean latents that the answer implies, then noise of the level above."""
    stride = 1000 // len(ddim.timesteps)
    for t in ddim.timesteps.flip(0).tolist():
        eps = unet(x, t, embedding).sample
        below, level = ddim.alphas_cumprod[max(t - stride, 0)], ddim.alphas_cumprod[t]
        clean = (x - (1 - below).sqrt() * eps) / below.sqrt()
        x = level.sqrt() * clean + (1 - level).sqrt() * eps
    return x


@pytest.mark.parametrize("strategy", ["none", "encoderattn", "decoderattn"])
@pytest.mark.parametrize("steps", [1, 6])
@torch.no_grad()
def test_sdedit(pipe, session, travelled, strategy, steps):
    config = replace(EDIT, strategy=strategy)
    image = SDEdit(steps / 10).make(session, TARGET, config)
    z, ddim = photo_latents(session), ddim_of(10)
    timesteps = ddim.timesteps[-steps:]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(EDIT.seed))
    x = denoise(pipe, forgotten(pipe, session, strategy), ddim.add_noise(z, noise, timesteps[:1]), timesteps, ddim)
    assert distance(travelled[0].latents, x) < NEAR
    assert np.array_equal(np.asarray(image), np.asarray(travelled[0].image))


@pytest.mark.parametrize("strategy", ["none", "encoderattn", "decoderattn"])
@torch.no_grad()
def test_inversion_with_prompts_swapped(pipe, session, travelled, strategy):
    Inversion().make(session, TARGET, replace(EDIT, strategy=strategy))
    unet, ddim = forgotten(pipe, session, strategy), ddim_of(10)
    x = invert_naively(unet, photo_latents(session), session.embedding, ddim)
    assert distance(travelled[0].latents, denoise(pipe, unet, x, ddim.timesteps, ddim)) < NEAR_INVERTED


def test_sdedit_of_full_strength_is_text_to_image(session, untuned):
    for learned in (session, untuned):
        for seed in (0, 1):
            config = replace(EDIT, seed=seed)
            one, other = (making.make(learned, TARGET, config) for making in (SDEdit(1.0), FromNoise()))
            assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_sdedit_of_hardly_any_strength_is_the_autoencoded_photo(session, travelled):
    SDEdit(1e-3).make(session, TARGET, EDIT)
    moved = travelled[0].latents - photo_latents(session)
    assert 0.02 < float(moved.std()) < 0.04  # the noise of timestep 0 stays, 0.029 of a standard deviation


def test_strength_counts(session):
    pictures = [np.asarray(SDEdit(strength).make(session, TARGET, EDIT)).astype(int) for strength in (0.2, 0.5, 0.9)]
    (photo,) = decode_latents(photo_latents(session), session.editor.model.vae).images
    moved = [np.abs(picture - np.asarray(photo)).mean() for picture in pictures]
    assert moved[0] < moved[1] < moved[2]


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_an_impossible_strength(strength):
    with pytest.raises(ValueError, match="strength"):
        SDEdit(strength)


def test_inversion_and_back_is_the_photo_of_a_trained_model():
    """In 50 steps without guidance, hardly worse than the autoencoder alone."""
    editor = Editor.from_pretrained("bundled")
    pixels, _ = render(sample_scenes(1, 7), editor.model.resolution)
    session = Untuned().learn(editor, to_images(pixels)[0], captions(sample_scenes(1, 7))[0], TARGET)
    z, schedule = photo_latents(session), ddim_schedule(editor.model.alphas_cumprod, 50, "epsilon")
    made = editor.travel(session, z, [Leg(inverted(schedule), None, 1.0), Leg(schedule, None, 1.0)])
    trip = decode_latents(z, editor.model.vae).images[0]
    assert made.latents.shape == z.shape and not torch.equal(made.latents, z)
    back, alone = (float(psnr(to_pixels([image]), pixels)) for image in (made.image, trip))
    assert back > alone - 1.5


def test_only_what_draws_noise_has_a_seed(session):
    other = replace(EDIT, seed=EDIT.seed + 1)
    for making, same in ((Inversion(), True), (Unchanged(), True), (SDEdit(0.5), False), (FromNoise(), False)):
        one, two = (np.asarray(making.make(session, TARGET, config)) for config in (EDIT, other))
        assert np.array_equal(one, two) == same


def test_steps_are_told(session):
    schedule = ddim_schedule(session.editor.model.alphas_cumprod, 4, "epsilon")
    legs, seen = [Leg(inverted(schedule), None, 1.0), Leg(schedule, TARGET, 3.0)], []
    made = session.editor.travel(session, photo_latents(session), legs, on_step=seen.append)
    sampled = [(event.step, event.total) for event in seen if event.stage == "sample"]
    assert sampled == [(step, 7) for step in range(1, 8)] and made.seconds.keys() == {"forget", "sample", "decode"}


def test_travel_refuses(session, reference_editor, editor):
    start, legs = photo_latents(session), []
    others = editor if session.editor is reference_editor else reference_editor
    with pytest.raises(ValueError, match="another editor"):
        others.travel(session, start, legs)
    with pytest.raises(ValueError, match="unknown strategy"):
        session.editor.travel(session, start, legs, strategy="encoderk")
    with pytest.raises(EditDiverged):
        SDEdit(0.9).make(session, TARGET, replace(EDIT, guidance_scale=1e9))


# learning


def naive_imagic(pipe, z, generator, learning, seed_state):
    """Kawar et al.: the target's embedding to the photo on a frozen UNet; then the whole UNet with it fixed."""
    unet, embedding = copy.deepcopy(pipe.unet), naive.embed(pipe, TARGET, naive.METHOD).detach().clone()
    alphas, losses = naive.scheduler(naive.METHOD).alphas_cumprod, []
    parts = [([embedding], learning.embedding_lr, learning.embedding_steps)]
    parts.append((list(unet.parameters()), learning.unet_lr, learning.unet_steps))
    for trained, rate, steps in parts:
        generator.set_state(seed_state)
        for parameter in (embedding, *unet.parameters()):
            parameter.requires_grad_(any(parameter is one for one in trained))
        adam = torch.optim.Adam(trained, lr=rate, eps=1e-8)
        for _ in range(steps):
            noise = torch.randn((learning.batch_size, *z.shape[1:]), generator=generator)
            t = torch.randint(0, 1000, (learning.batch_size,), generator=generator)
            signal = alphas[t][:, None, None, None]
            noisy = signal.sqrt() * z + (1 - signal).sqrt() * noise
            answer = unet(noisy, t, embedding.expand(learning.batch_size, -1, -1)).sample
            loss = ((answer - noise) ** 2).mean()
            losses.append(loss.item())
            adam.zero_grad()
            (65536 * loss).backward()
            adam.step()
    return embedding.detach(), dict(unet.named_parameters()), losses


def test_imagic(reference_editor, pipe, photo):
    learning = Imagic(embedding_steps=3, unet_steps=2, batch_size=2, embedding_lr=1e-2, unet_lr=1e-3)
    session = learning.learn(reference_editor, photo, CAPTION, TARGET)
    generator = torch.Generator().manual_seed(session.config.seed)
    z = naive.first_latents(pipe, session.source, generator, naive.METHOD).detach()
    embedding, weights, losses = naive_imagic(pipe, z, generator, learning, generator.get_state())
    assert distance(session.embedding, embedding) < NEAR
    assert session.losses == pytest.approx(losses, rel=1e-5) and len(losses) == 5
    assert session.tuned.keys() == {f"unet.{name}" for name in weights}
    for name, weight in weights.items():
        assert distance(session.tuned[f"unet.{name}"], weight.detach()) < NEAR
    assert session.caption == TARGET and session.seconds.keys() == {"caption", "encode", "tune"}


def test_imagic_goes_from_the_photo_to_the_target(editor, pipe, photo):
    """Its strength is eta: 0 the optimised embedding, 1 the target's own."""
    session = Imagic(embedding_steps=3, unet_steps=2, batch_size=2, embedding_lr=0.05).learn(
        editor, photo, CAPTION, TARGET
    )
    target = naive.embed(pipe, TARGET, naive.METHOD)
    assert distance(session.embedding, target) > 0.01
    same = replace(session, embedding=target.detach(), prompts={})
    at = {eta: np.asarray(FromNoise(eta).make(session, TARGET, EDIT)) for eta in (0.0, 1.0)}
    assert np.array_equal(at[1.0], np.asarray(FromNoise(0.0).make(same, TARGET, EDIT)))
    assert not np.array_equal(at[0.0], at[1.0])


def test_nothing_learned(untuned, pipe, path, photo, tmp_path):
    assert untuned.tuned == {} and untuned.losses == () and untuned.caption == CAPTION
    assert distance(untuned.embedding, naive.embed(pipe, CAPTION, naive.METHOD).detach()) < 1e-6
    with pytest.raises(ValueError, match="no weight was tuned, and strategy 'encoderattn'"):
        untuned.edit(TARGET, replace(EDIT, strategy="encoderattn"))
    with pytest.raises(ValueError, match="LoRA would be empty"):
        untuned.export_lora(tmp_path / "lora.safetensors", 1)
    for delta in ("fp32", "int8"):
        untuned.save(tmp_path / "untuned.session", delta)
        again = path.load_session(tmp_path / "untuned.session")
        assert again.tuned == {} and torch.equal(again.embedding, untuned.embedding)


@torch.no_grad()
def test_text_to_image(untuned, pipe):
    latents = untuned.edit(TARGET, replace(EDIT, gamma=1.0)).latents
    x, ddim = torch.randn(latents.shape, generator=torch.Generator().manual_seed(EDIT.seed)), ddim_of(10)
    assert distance(latents, denoise(pipe, pipe.unet, x, ddim.timesteps, ddim)) < NEAR


def test_dreambooth_is_as_much_stronger_as_the_model_asks(folder, photo):
    editor = Editor.from_pretrained(folder)
    own = TuneConfig(unet_lr=6e-4)
    editor.defaults = replace(editor.defaults, tune=own)
    seen = []

    def tune(photo, config, **named):
        seen.append(config)

    editor.tune = tune
    DreamBooth().learn(editor, photo, CAPTION, TARGET)
    DreamBooth(2.0).learn(editor, photo, CAPTION, TARGET)
    rates = [(config.unet_lr, config.text_encoder_lr) for config in seen]
    assert rates == [pytest.approx((2e-4, 2e-4)), pytest.approx((1e-5, 1e-5))]
    assert {(c.profile, c.num_steps, c.batch_size, c.caption) for c in seen} == {("dreambooth", 100, 4, CAPTION)}


def test_tuned_takes_changes(editor, photo):
    session = Tuned({**TUNE, "num_steps": 1}).learn(editor, photo, CAPTION, TARGET)
    assert len(session.losses) == 1 and session.config.unet_lr == 1e-3 and session.caption == CAPTION


def test_a_baseline_is_timed(untuned):
    made = Baseline(Untuned(), Unchanged()).make(untuned, TARGET, EDIT)
    assert np.array_equal(np.asarray(made.image), np.asarray(untuned.source)) and 0 <= made.seconds < 1
    assert Baseline(Untuned(), SDEdit()).make(untuned, TARGET, EDIT).seconds > made.seconds
    assert {"photo unchanged", "text-to-image", "SDEdit", "DDIM inversion", "Imagic", "DreamBooth"} <= BASELINES.keys()


# what has rate 0


@pytest.mark.parametrize("profile", ["official", "dreambooth"])
@pytest.mark.parametrize("part", ["unet", "words"])
def test_a_rate_of_0_leaves_that_part(editor, reference_editor, photo, profile, part):
    words = "text_encoder_lr" if profile == "dreambooth" else "embedding_lr"
    config = TuneConfig(caption=CAPTION).replace(profile=profile, num_steps=3, batch_size=2, unet_lr=1e-3)
    config = config.replace(**{words: 1e-3} | {"unet_lr" if part == "unet" else words: 0.0})
    ours, plain = (one.tune(photo, config) for one in (editor, reference_editor))
    assert ours.tuned.keys() == plain.tuned.keys()
    assert {name.partition(".")[0] for name in ours.tuned} == (
        {"unet"} if part == "words" else {"text_encoder"} if profile == "dreambooth" else set()
    )
    start = Untuned().learn(editor, photo, CAPTION, TARGET).embedding
    assert (distance(ours.embedding, start) < 1e-6) == (part == "words")
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    assert distance(ours.embedding, plain.embedding) < 1e-3


@pytest.mark.parametrize("mode", ["exact", "fast", "lean"])
def test_no_gradient_is_made_of_what_has_rate_0(editor, mode):
    unet, way = FusedUNet(editor.model.unet, DTYPES[mode]), Way(mode, 2, False)
    config = TuneConfig(num_steps=2, batch_size=2, unet_lr=0.0)
    ids, _ = editor._prompts.tokens(CAPTION)
    embedding = editor.model.text_encoder(ids).last_hidden_state
    learner = Learner(unet, editor.originals(), editor.model.text_encoder, [], config, way)
    asked = []
    inputs = TuneInputs(
        torch.randn(1, 4, 8, 8), embedding, ids, editor.model.alphas_cumprod, "epsilon", [], config,
        torch.Generator().manual_seed(0), lambda *_: asked.append([leaf.tensor.requires_grad for leaf in unet.leaves]),
    )  # fmt: skip
    learned = learner.learn(inputs)
    assert learned.tuned == {} and not torch.equal(learned.embedding, embedding)
    assert len(asked) == 2 and not any(map(any, asked))


def test_a_given_embedding_is_where_learning_starts(editor, photo):
    config = TuneConfig(caption=CAPTION, **TUNE | dict(embedding_lr=0.0))
    given = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))
    session = editor.tune(photo, config, embedding=given)
    assert torch.equal(session.embedding, given) and session.tuned
    with pytest.raises(ValueError, match=r"shape \[1, 7, 32\]; expected \[1, 77, 32\]"):
        editor.tune(photo, config, embedding=given[:, :7])
    with pytest.raises(ValueError, match="set text_encoder_lr to 0"):
        editor.tune(photo, config.replace(profile="dreambooth", embedding_lr=0.0), embedding=given)
