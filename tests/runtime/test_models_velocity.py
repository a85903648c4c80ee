"""Models that predict the velocity, as Stable Diffusion 2.x at 768 pixels: tune and edit against the naive method."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from forgedit import EditConfig, Editor
from forgedit.stages.sample import clean_and_noise
from forgedit.stages.tune import training_target
from tests.runtime import naive
from tests.runtime.compare import PROFILES, TOLERANCE, difference, engine_latents, learn_naively, tuned_differences

VELOCITY = dict(loss_target="v", prediction_type="v_prediction")


@pytest.fixture(scope="module")
def velocity_folder(folder, tmp_path_factory):
    """The small random pipeline, its scheduler as Stable Diffusion 2.1's folder has it."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("velocity") / "model")
    path = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | dict(prediction_type="v_prediction", steps_offset=1, skip_prk_steps=True)
    path.write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def velocity_editor(velocity_folder):
    return Editor.from_pretrained(velocity_folder, numerics="reference")


@pytest.fixture(scope="module")
def pipe(folder):
    return naive.load(folder)


def random_latents():
    generator = torch.Generator().manual_seed(0)
    noise, latents = torch.randn(2, 3, 4, 5, 7, generator=generator)
    return noise, latents, torch.tensor([0, 500, 999]), DDIMScheduler(prediction_type="v_prediction")


def test_target_is_diffusers_velocity():
    noise, latents, timesteps, ddim = random_latents()
    signal = ddim.alphas_cumprod[timesteps][:, None, None, None]
    assert torch.equal(training_target(noise, latents, signal, "epsilon"), noise)
    target = training_target(noise, latents, signal, "v_prediction")
    assert torch.equal(target, ddim.get_velocity(latents, noise, timesteps))


def test_velocity_gives_back_what_it_was_made_of():
    noise, latents, timesteps, ddim = random_latents()
    for index, timestep in enumerate(timesteps):
        alpha_cumprod = ddim.alphas_cumprod[timestep].double()
        noisy = alpha_cumprod**0.5 * latents[index].double() + (1 - alpha_cumprod) ** 0.5 * noise[index].double()
        velocity = training_target(noise[index].double(), latents[index].double(), alpha_cumprod, "v_prediction")
        clean, spread = clean_and_noise(noisy, velocity, alpha_cumprod, "v_prediction")
        assert difference(clean, latents[index].double()) < 1e-12
        assert difference(spread, noise[index].double()) < 1e-12


@pytest.mark.parametrize("function", [training_target, clean_and_noise])
def test_unknown_prediction_type(function):
    ones = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="unknown prediction_type 'v'; expected one of: epsilon, v_prediction"):
        function(ones, ones, ones, "v")


@pytest.mark.parametrize("profile", PROFILES)
def test_tuning_and_editing_have_equal_bits(velocity_editor, photo, pipe, profile):
    config, rules = PROFILES[profile]
    rules = replace(rules, **VELOCITY)
    session, learned = velocity_editor.tune(photo, config), learn_naively(pipe, photo, config, rules)
    _, z = engine_latents(velocity_editor, photo, config)
    assert tuned_differences(session, z, pipe, learned).worst() == 0
    settings = EditConfig(num_steps=7, gamma=1.1, strategy="encoderattn", seed=2)
    e_tgt = naive.embed(learned.pipe, "a dog", rules).detach()
    expected = naive.sample(
        naive.forget(pipe, learned, settings.strategy, settings.keep, rules),
        learned,
        naive.blend_vs(learned.e_src, e_tgt, settings.gamma, rules),
        rules,
        steps=settings.num_steps,
        guidance=settings.guidance_scale,
        seed=settings.seed,
    )
    assert difference(session.edit("a dog", settings).latents, expected) == 0


@pytest.mark.parametrize(
    "wrong", [dict(loss_target="noise"), dict(loss_target="sample"), dict(prediction_type="epsilon")]
)
def test_a_wrong_target_or_conversion_is_seen(velocity_editor, photo, pipe, wrong):
    config, rules = PROFILES["official"]
    rules = replace(rules, **VELOCITY | wrong)
    session, learned = velocity_editor.tune(photo, config), learn_naively(pipe, photo, config, rules)
    _, z = engine_latents(velocity_editor, photo, config)
    settings = EditConfig(num_steps=7, gamma=0.0)  # the source embedding alone
    arguments = dict(steps=settings.num_steps, guidance=settings.guidance_scale, seed=settings.seed)
    expected = naive.sample(learned.pipe.unet, learned, learned.e_src, rules, **arguments)
    tuned_alike = tuned_differences(session, z, pipe, learned).worst() < TOLERANCE
    assert tuned_alike == ("loss_target" not in wrong)
    assert difference(session.edit("a dog", settings).latents, expected) > TOLERANCE


def test_epsilon_and_velocity_differ_by_the_scheduler_alone(velocity_editor, editor):
    assert editor.model.prediction_type == "epsilon" and velocity_editor.model.prediction_type == "v_prediction"
    assert torch.equal(editor.model.alphas_cumprod, velocity_editor.model.alphas_cumprod)
