"""The sampler as plain functions, against diffusers' DDIMScheduler."""

import pytest
import torch
from diffusers import DDIMScheduler

from forgedit.stages.sample import ddim_timesteps, sample_ddim


def scheduler(**changes):
    return DDIMScheduler(
        **dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
               set_alpha_to_one=False, steps_offset=0) | changes
    )  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 7, 50, 333, 1000])
def test_timesteps(num_steps):
    ddim = scheduler()
    ddim.set_timesteps(num_steps)
    assert ddim_timesteps(num_steps) == ddim.timesteps.tolist()


def test_fifty_steps_go_from_980_to_0():
    assert ddim_timesteps(50)[:2] == [980, 960] and ddim_timesteps(50)[-1] == 0


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_number_of_steps(num_steps):
    with pytest.raises(ValueError, match="num_steps"):
        ddim_timesteps(num_steps)


def predict(latents, timestep, embeddings, return_dict):
    """Any smooth function of all three inputs."""
    return (torch.sin(latents * 3 + float(timestep) / 500) + embeddings.mean(dim=(1, 2))[:, None, None, None],)


@pytest.mark.parametrize("num_steps", [1, 7, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("broken", [{}, {"set_alpha_to_one": True}, {"steps_offset": 1}, {"clip_sample": True}])
def test_against_diffusers(num_steps, prediction_type, broken):
    ddim = scheduler(prediction_type=prediction_type, **broken)
    ddim.set_timesteps(num_steps)
    u, c = torch.zeros(1, 77, 8), torch.ones(1, 77, 8)
    latents = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    for t in ddim.timesteps:
        pred_u, pred_c = predict(torch.cat([latents] * 2), t, torch.cat([u, c]), False)[0].chunk(2)
        latents = ddim.step(pred_u + 2.0 * (pred_c - pred_u), t, latents).prev_sample
    steps = []
    ours = sample_ddim(
        predict, c, u, ddim.alphas_cumprod, prediction_type, (4, 5, 7), num_steps, 2.0,
        torch.Generator().manual_seed(0),
        lambda step, total, loss: steps.append((step, total)),
    ).latents  # fmt: skip
    assert torch.equal(ours, latents) == (not broken)
    assert steps == [(step, num_steps) for step in range(1, num_steps + 1)]
