"""Samplers of diffusers by name, built from a model's own noise schedule: the same picture in fewer steps than DDIM.

'ddim' is the method's own (METHOD item 14); the others are not the reference, and a report says so. None draws noise:
one seed, one picture. They are made with diffusers' defaults, but for what _SAMPLERS says.

Why Karras' noise levels: how far the bundled model's latents were from DDIM's in 1000 steps (root mean square, 3 seeds,
one prompt, CPU). With guidance 3, its own: DDIM 0.076 in 20 steps and 0.036 in 50; in 20 steps dpmsolver++ 0.022 and
unipc 0.010, but with diffusers' default levels 0.068 and 0.059. Few steps and much guidance suit none: with guidance
7.5, DDIM 0.18 in 20 steps, dpmsolver++ 0.07, unipc 0.23, and in 25 steps 0.15, 0.01, 0.14.
"""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from forgedit.model.folder import checked_prediction_type

# Noise levels spaced as Karras et al. 2022, arXiv 2206.00364, eq. 5, and, like the method's, no step to noise zero
_MULTISTEP = dict(solver_order=2, use_karras_sigmas=True, final_sigmas_type="sigma_min")
_SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=False, steps_offset=0)),
    # Lu et al. 2022, arXiv 2211.01095, 2M
    "dpmsolver++": (DPMSolverMultistepScheduler, dict(solver_type="midpoint") | _MULTISTEP),
    # Zhao et al. 2023, arXiv 2302.04867, B2(h)
    "unipc": (UniPCMultistepScheduler, dict(solver_type="bh2") | _MULTISTEP),
}
SCHEDULERS = tuple(_SAMPLERS)

# A schedule of zero terminal signal ends in 0, where the multistep samplers would divide by it; diffusers puts the same
_LEAST_SIGNAL = 2.0**-24


class Scheduler:
    """One edit's sampler; it remembers the UNet's last answers, so each edit, or batch of edits, needs a new one.

    timesteps: the UNet's, in the order of the steps
    init_noise_scale: what the first noise, of variance 1, is multiplied by
    """

    def __init__(self, inner: Any, num_steps: int) -> None:
        inner.set_timesteps(num_steps)
        if hasattr(inner, "set_begin_index"):  # else it looks its first timestep up, and that may come twice
            inner.set_begin_index(0)
        self.timesteps: list[int] = inner.timesteps.tolist()
        self.init_noise_scale = float(inner.init_noise_sigma)
        self._inner = inner
        self._next = 0

    def step(self, latents: Tensor, guided_prediction: Tensor, index: int) -> Tensor:
        """The latents of the next timestep, or after the last the result.

        latents: [B, C, h, w], float32; guided_prediction: likewise, any float dtype: the UNet's answer to these latents
            at timesteps[index], guidance applied
        Returns: new latents, float32
        Raises: ValueError unless each index is given once, in order from 0
        """
        if index != self._next or index == len(self.timesteps):
            raise ValueError(
                f"step {index} was asked for, step {self._next} of {len(self.timesteps)} is next; "
                "expected each once, in order: make a new scheduler for each edit"
            )
        self._next += 1
        prediction = guided_prediction.to(latents.dtype)
        result: Tensor = self._inner.step(prediction, self.timesteps[index], latents, return_dict=False)[0]
        return result


def make_scheduler(name: str, alphas_cumprod: Tensor, prediction_type: str, num_steps: int) -> Scheduler:
    """A fresh sampler.

    name: one of SCHEDULERS; alphas_cumprod: [train steps], the model's, on any device
    prediction_type: 'epsilon' or 'v_prediction', what the UNet answers
    num_steps: UNet calls (guided pairs), at most the train steps; the multistep ones take at least 2, and suit from
        about 20 on. DDIM's timesteps are spaced 'leading' (980 … 0 of 1000 for 50), the others' go from the last train
        step to the first, at the noise levels of Karras et al., rounded, so that one may come twice
    Raises: ValueError for an unknown name, or num_steps out of range; ModelError for the prediction type
    """
    if name not in _SAMPLERS:
        raise ValueError(f"unknown scheduler {name!r}; expected one of: {', '.join(SCHEDULERS)}")
    least, most = 1 if name == "ddim" else 2, len(alphas_cumprod)
    if not least <= num_steps <= most:
        raise ValueError(
            f"num_steps {num_steps} is out of range for {name}; expected a whole number in [{least}, {most}]"
        )
    kind, options = _SAMPLERS[name]
    signal = alphas_cumprod.double().cpu().clamp(min=_LEAST_SIGNAL)
    before = signal.roll(1)
    before[0] = 1
    inner = kind(
        num_train_timesteps=len(signal),
        trained_betas=(1 - signal / before).tolist(),
        prediction_type=checked_prediction_type(prediction_type),
        **options,
    )
    return Scheduler(inner, num_steps)
