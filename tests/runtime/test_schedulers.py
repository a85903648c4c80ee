"""The named samplers, against diffusers' own loops and against the exact solution for data whose denoiser is known."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from forgedit.errors import ModelError
from forgedit.model.schedulers import SCHEDULERS, make_scheduler
from forgedit.stages.sample import ddim_step, ddim_timesteps

TRAINED = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ALPHAS_CUMPROD = DDIMScheduler(**TRAINED).alphas_cumprod
KARRAS = dict(solver_order=2, use_karras_sigmas=True, final_sigmas_type="sigma_min")
MULTISTEP = ("dpmsolver++", "unipc")


def diffusers_own(name, prediction_type):
    options = TRAINED | dict(prediction_type=prediction_type)
    if name == "ddim":
        return DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=False, steps_offset=0)
    if name == "dpmsolver++":
        return DPMSolverMultistepScheduler(**options, **KARRAS, algorithm_type="dpmsolver++", solver_type="midpoint")
    return UniPCMultistepScheduler(**options, **KARRAS, solver_type="bh2")


def noise(shape=(2, 4, 5, 7), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predict(latents, timestep):
    """Any smooth function of both."""
    return torch.sin(latents * 3 + timestep / 500)


class Gaussian:
    """Latents of a Gaussian distribution, whose denoiser, and whose way from noise, are known exactly.

    With mean m and deviation s, the latents at signal a are sqrt(a) m + sqrt(a s² + 1 - a) z, with one z all the way.
    """

    mean = noise(seed=1).double()
    deviation = 0.3

    def predict(self, latents, timestep, prediction_type):
        a = ALPHAS_CUMPROD[timestep].double()
        apart = latents.double() - a.sqrt() * self.mean
        clean = self.mean + a.sqrt() * self.deviation**2 / (a * self.deviation**2 + 1 - a) * apart
        epsilon = (latents - a.sqrt() * clean) / (1 - a).sqrt()
        velocity = a.sqrt() * epsilon - (1 - a).sqrt() * clean
        return (epsilon if prediction_type == "epsilon" else velocity).to(latents.dtype)

    def exact(self, start):
        """From `start` at the last train step to the first."""
        last, first = ALPHAS_CUMPROD[-1].double(), ALPHAS_CUMPROD[0].double()
        z = (start.double() - last.sqrt() * self.mean) / (last * self.deviation**2 + 1 - last).sqrt()
        return first.sqrt() * self.mean + (first * self.deviation**2 + 1 - first).sqrt() * z


def sample(name, num_steps, predict, prediction_type="epsilon", alphas_cumprod=ALPHAS_CUMPROD):
    scheduler = make_scheduler(name, alphas_cumprod, prediction_type, num_steps)
    latents = noise() * scheduler.init_noise_scale
    assert len(scheduler.timesteps) == num_steps
    for index, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(latents, predict(latents, timestep), index)
    return latents


def gap(a, b):
    """Root mean square."""
    return float((a.double() - b.double()).square().mean().sqrt())


@pytest.mark.parametrize("num_steps", [2, 7, 20])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_against_diffusers_own_loop(name, prediction_type, num_steps):
    own, latents = diffusers_own(name, prediction_type), noise()
    own.set_timesteps(num_steps)
    for timestep in own.timesteps:
        latents = own.step(predict(latents, int(timestep)), timestep, latents).prev_sample
    ours = sample(name, num_steps, predict, prediction_type)
    assert gap(ours, latents) < 1e-5 * float(latents.std())
    others = [sample(other, num_steps, predict, prediction_type) for other in SCHEDULERS if other != name]
    assert all(gap(other, latents) > 1e-3 for other in others)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_is_the_methods_own(prediction_type):
    latents, timesteps = noise(), ddim_timesteps(20)
    for timestep in timesteps:
        alphas = ALPHAS_CUMPROD[timestep], ALPHAS_CUMPROD[max(timestep - 50, 0)]
        latents = ddim_step(latents, predict(latents, timestep), *alphas, prediction_type)
    assert make_scheduler("ddim", ALPHAS_CUMPROD, prediction_type, 20).timesteps == timesteps
    assert gap(sample("ddim", 20, predict, prediction_type), latents) < 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_more_steps_come_nearer_to_the_exact_solution(name, prediction_type):
    data = Gaussian()
    exact = data.exact(noise())
    errors = [
        gap(sample(name, steps, lambda x, t: data.predict(x, t, prediction_type), prediction_type), exact)
        for steps in (5, 10, 20, 40)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1] and errors[-1] < 0.005


@pytest.mark.parametrize("name", MULTISTEP)
def test_twenty_steps_come_nearer_to_a_thousand_of_ddim_than_fifty_of_ddim(name):
    data = Gaussian()

    def predict(latents, timestep):
        return data.predict(latents, timestep, "epsilon")

    thousand = sample("ddim", 1000, predict)
    assert gap(thousand, data.exact(noise())) < 0.005
    ours, ddim = (gap(sample(*case, predict), thousand) for case in ((name, 20), ("ddim", 50)))
    assert ours < ddim / 2


def test_both_prediction_types_are_one_way():
    """Up to the rounding of the timesteps: the multistep samplers' noise levels lie between the model's own."""
    data = Gaussian()
    for name in SCHEDULERS:
        epsilon, velocity = (
            sample(name, 10, lambda x, t, kind=kind: data.predict(x, t, kind), kind)
            for kind in ("epsilon", "v_prediction")
        )
        assert gap(epsilon, velocity) < (1e-6 if name == "ddim" else 2e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_instances_share_nothing(name):
    """Two edits in turns, as two threads may run them, give what each gives alone."""
    alone = sample(name, 6, predict)
    schedulers = [make_scheduler(name, ALPHAS_CUMPROD, "epsilon", 6) for _ in range(2)]
    latents = [noise(), noise(seed=5)]
    for index, timestep in enumerate(schedulers[0].timesteps):
        for which, scheduler in enumerate(schedulers):
            latents[which] = scheduler.step(latents[which], predict(latents[which], timestep), index)
    assert torch.equal(latents[0], alone)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_half_precision_answers_are_stepped_in_float32(name):
    """And the latents given are not written."""
    latents, results = noise(), []
    answers = [predict(latents, timestep).bfloat16() for timestep in (900, 500, 100)]
    for given in (answers, [answer.float() for answer in answers]):
        scheduler, x = make_scheduler(name, ALPHAS_CUMPROD, "epsilon", 3), latents
        for index, answer in enumerate(given):
            before = x.clone()
            after = scheduler.step(x, answer, index)
            assert after.dtype == torch.float32 and torch.equal(x, before)
            x = after
        results.append(x)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_steps", [2, 999, 1000])
def test_any_number_of_steps_is_finite(name, num_steps):
    assert sample(name, num_steps, predict).isfinite().all()


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_schedule_that_ends_in_no_signal(name):
    alphas_cumprod = ALPHAS_CUMPROD.clone()
    alphas_cumprod[-1] = 0
    assert sample(name, 10, predict, "v_prediction", alphas_cumprod).isfinite().all()


def test_steps_out_of_order_are_refused():
    scheduler, latents = make_scheduler("unipc", ALPHAS_CUMPROD, "epsilon", 2), noise()
    with pytest.raises(ValueError, match="step 1 was asked for, step 0 of 2 is next"):
        scheduler.step(latents, latents, 1)
    for index in range(2):
        scheduler.step(latents, latents, index)
    for index in (0, 1, 2):
        with pytest.raises(ValueError, match="make a new scheduler for each edit"):
            scheduler.step(latents, latents, index)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"unknown scheduler 'euler'; expected one of: ddim, dpmsolver\+\+, unipc"):
        make_scheduler("euler", ALPHAS_CUMPROD, "epsilon", 20)
    for name, num_steps in (("ddim", 0), ("dpmsolver++", 1), ("unipc", 1), ("unipc", 1001)):
        with pytest.raises(ValueError, match=f"num_steps {num_steps} is out of range"):
            make_scheduler(name, ALPHAS_CUMPROD, "epsilon", num_steps)
    with pytest.raises(ModelError, match="prediction_type 'sample' is not supported"):
        make_scheduler("unipc", ALPHAS_CUMPROD, "sample", 20)
