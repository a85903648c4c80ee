"""The method's plain path: diffusers' own modules in float32, one edit at a time. The oracle of everything faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from forgedit.config import EditConfig
from forgedit.engine.graphs import GraphCache
from forgedit.engine.sampler import Schedule
from forgedit.engine.tune_inputs import Learned, TuneInputs
from forgedit.model import Model
from forgedit.stages.blend import blend_embeddings
from forgedit.stages.decode import decode_latents
from forgedit.stages.forget import forget_weights
from forgedit.stages.sample import clean_and_noise, sample_ddim
from forgedit.stages.tune import tune
from forgedit.weights import Weights


class Reference:
    """Edits on the model's working UNet, which tuning uses too.

    weights: both sides of that UNet's weights; backend: of the forgetting merge; graphs: not used, nothing is captured
    """

    def __init__(self, model: Model, weights: Weights, backend: str, graphs: GraphCache) -> None:
        self._model, self._weights, self._backend = model, weights, backend
        self.graphs = graphs
        self._loaded: tuple[object, str, float] | None = None  # owner, strategy and keep now in the working UNet

    def max_edits(self, shape: tuple[int, int, int]) -> int:
        """How many edits sample takes together, for latents of `shape`."""
        return 1

    def encoder(self, width: int, height: int, given: int | None) -> Any:
        """The VAE that encodes a photo, whatever its size."""
        return self._model.vae

    def learn(self, inputs: TuneInputs) -> Learned:
        """As Tuner.learn, on the model's own modules. Raises: ValueError for a mode or a budget of the engine's"""
        config, names = inputs.config, inputs.names
        if config.mode != "auto" or config.memory_bytes is not None:
            raise ValueError("the reference path has no modes and no memory plan; leave mode and memory_bytes out")
        model, weights = self._model, self._weights
        self.reset()
        weights.make_writable(names)
        learned = tune(
            unet=model.unet,
            text_encoder=model.text_encoder,
            token_ids=inputs.token_ids,
            embedding=inputs.embedding,
            latents=inputs.latents,
            alphas_cumprod=inputs.alphas_cumprod,
            prediction_type=inputs.prediction_type,
            config=config,
            generator=inputs.generator,
            on_step=inputs.on_step,
        )
        return Learned(learned.embedding, weights.take(names), learned.losses, learned.stopped_early, "the plain path")

    def load(self, owner: object, tuned: Mapping[str, Tensor], strategy: str, keep: float) -> None:
        """Bring tuned weights, forgotten as the strategy says, into the UNet; nothing if they are there.

        owner: whose they are; equal for equal weights; tuned: by name, prefixed 'unet.'
        """
        key = (owner, strategy, keep)
        if self._loaded == key:
            return
        weights, self._loaded = self._weights, None
        weights.restore(weights.changed - tuned.keys())
        weights.make_writable(tuned)
        forget_weights(tuned, weights.original, weights.working, strategy, keep, self._backend)
        self._loaded = key

    def blend(self, source: Tensor, target: Tensor, configs: Sequence[EditConfig]) -> Tensor:
        """Edit embeddings [B, T, D], one a config, of source and target [1, T, D]."""
        return torch.cat([blend_embeddings(source, target, config) for config in configs])

    def sample(
        self,
        embeddings: Tensor,
        unconditional: Tensor,
        shape: tuple[int, int, int],
        configs: Sequence[EditConfig],
        on_step: Callable[[int, int, float | None], None],
    ) -> Tensor:
        """Latents [1, C, h, w] of the only config. Raises: ValueError for a scheduler that is not the method's."""
        (config,) = configs
        if config.scheduler != "ddim":
            raise ValueError(
                f"scheduler {config.scheduler!r} is not the method's; the reference path takes 'ddim' alone"
            )
        model = self._model
        return sample_ddim(
            unet=model.unet,
            embedding=embeddings,
            unconditional=unconditional,
            alphas_cumprod=model.alphas_cumprod,
            prediction_type=model.prediction_type,
            shape=shape,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            generator=torch.Generator().manual_seed(config.seed),
            on_step=on_step,
        ).latents

    @torch.no_grad()
    def predict(self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The noise that the UNet sees under each of several prompts, without guidance.

        noisy: [B, C, h, w] float32; timesteps: [B] int64, one a row; embeddings: [K, T, D]; all on the model's device
        Returns: [K, B, C, h, w] float32
        """
        model, alphas = self._model, self._model.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        prompts = len(embeddings)
        answers = model.unet(
            noisy.repeat(prompts, 1, 1, 1),
            timesteps.repeat(prompts),
            embeddings.repeat_interleave(len(noisy), dim=0),
            return_dict=False,
        )[0].unflatten(0, (prompts, len(noisy)))
        return clean_and_noise(noisy, answers, alphas, model.prediction_type)[1]

    @torch.no_grad()
    def follow(
        self,
        schedule: Schedule,
        start: Tensor,
        embeddings: Tensor,
        unconditional: Tensor,
        guidance_scale: float,
        on_step: Callable[[int, int, float | None], None],
    ) -> Tensor:
        """As Resident.follow, for one edit and a schedule without a solver; idle steps are done like any other."""
        latents, both = start, torch.cat([unconditional, embeddings])
        steps = zip(schedule.timesteps.tolist(), schedule.coefficients.tolist(), strict=True)
        for step, (timestep, (kept, moved)) in enumerate(steps, 1):
            answer = self._model.unet(torch.cat([latents, latents]), timestep, both, return_dict=False)[0]
            unconditional_pred, conditional_pred = answer.chunk(2)
            prediction = unconditional_pred + guidance_scale * (conditional_pred - unconditional_pred)
            latents = kept * latents + moved * prediction
            on_step(step, len(schedule.timesteps), None)
        return latents

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents [B, C, h, w]."""
        return list(decode_latents(latents, self._model.vae).images)

    def reset(self) -> None:
        """The working weights are the originals again, by another's hand."""
        self._loaded = None

    def release(self) -> None:
        """Nothing: a tune keeps nothing here."""

    def shrink(self) -> bool:
        """Whether less can be done at once: never, it is one edit already."""
        return False
