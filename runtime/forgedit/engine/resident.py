"""The resident engine: one UNet, laid out once, that serves every photo, strategy, strength and seed after it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from forgedit.config import EditConfig
from forgedit.engine.graphs import GraphCache
from forgedit.engine.numerics import NUMERICS
from forgedit.engine.parking import Parking
from forgedit.engine.plan import MOST_EDITS, SamplingPlan, device_budget, plan_sampling, show_bytes
from forgedit.engine.sampler import Sampler, Schedule, ddim_schedule, solver_schedule
from forgedit.engine.tune_inputs import Learned, TuneInputs
from forgedit.engine.tuner import Tuner
from forgedit.engine.vae_plan import VAECost, choose_rows, in_words
from forgedit.engine.weights import lay_out
from forgedit.model import Model
from forgedit.model.schedulers import make_scheduler
from forgedit.model.vae_bands import BandedVAE
from forgedit.stages.decode import decode_latents
from forgedit.stages.sample import clean_and_noise
from forgedit_kernels import backend_for, blend_embeddings

log = logging.getLogger("forgedit")

DECODE_TOGETHER = 4  # pictures: the VAE's features are large, and few of them fill a device


class Resident:
    """Edits on kernels of our own; the model's modules are read, never written.

    model: whose UNet holds the originals while this is built
    original: the same weights, prefixed 'unet.', and the text encoder's, prefixed 'text_encoder.'
    numerics: of NUMERICS, but 'reference'; backend: of forgedit_kernels, for every op that has it
    graphs: keeps what is captured
    memory_bytes: that the process may hold on the device; None for all there is, on a CPU for a fixed batch
    parking: of the model's weights, while a photo is learned; None never parks
    """

    def __init__(
        self,
        model: Model,
        original: Mapping[str, Tensor],
        numerics: str,
        backend: str,
        graphs: GraphCache,
        memory_bytes: int | None = None,
        parking: Parking | None = None,
    ) -> None:
        self._model, self._backend, self._dtype = model, backend, NUMERICS[numerics]
        self._unet, self._weights = lay_out(model.unet, self._dtype, original, backend)
        self._tuner = Tuner(model, original, numerics, self._unet, self._weights, backend, memory_bytes, parking)
        self.graphs = graphs
        self._sampler = Sampler(self._unet, graphs, backend)
        self._schedules: dict[tuple[str, int], Schedule] = {}
        self._memory_bytes, self._most = memory_bytes, MOST_EDITS
        self._plans: dict[tuple[int, int, int], SamplingPlan] = {}
        self._encodings: dict[tuple[int, int, int | None], tuple[int | None, int]] = {}
        self._vae: Any = model.vae
        if self._dtype != torch.float32:
            half: Any = copy.deepcopy(model.vae)
            self._vae = torch.nn.Module.to(half, self._dtype).to(memory_format=torch.channels_last)

    def max_edits(self, shape: tuple[int, int, int]) -> int:
        """How many edits sample takes together, for latents of `shape`. Raises: RuntimeError if not even one fits."""
        if shape not in self._plans:  # once, as the buffers of the first batch would count against the second's
            self._plans[shape] = self.plan(shape)
        return min(self._plans[shape].batch, self._most)

    def plan(self, shape: tuple[int, int, int]) -> SamplingPlan:
        """What sampling of latents of `shape` is predicted to hold; logged if there is a budget.

        Raises: RuntimeError if not even one edit fits
        """
        device, model = self._unet.device, self._model
        budget = self._memory_bytes or device_budget(device)
        plan = plan_sampling(
            model.unet.config,
            model.vae.config,
            *shape[1:],
            itemsize=self._dtype.itemsize,
            weights=self._held(),
            budget=budget,
            tokens=model.tokenizer.model_max_length,
            decode_batch=DECODE_TOGETHER,
            copies=device.type == "cpu" and self._vae is model.vae,  # which is contiguous
        )
        if budget is not None:
            peak, way = f"{show_bytes(plan.peak)} of {show_bytes(budget)}", in_words(plan.decode_rows)
            log.info("sample: %d edits at once, decoded %s; predicted at most: %s", plan.batch, way, peak)
        return plan

    def _held(self) -> int:
        """Bytes that lie on the device: on a GPU whatever this process holds, on a CPU all weights."""
        if self._unet.device.type == "cuda":
            return torch.cuda.memory_allocated(self._unet.device)
        model = self._model
        parts = (model.unet, model.vae, model.text_encoder, model.captioner, self._vae)
        kept = {id(w): w.nbytes for part in parts if part is not None for w in part.parameters()}
        return sum(kept.values()) + sum(w.nbytes for w in self._unet.weights.values())

    def encoder(self, width: int, height: int, given: int | None) -> Any:
        """The VAE that encodes a photo: whole, or where the budget wants it, in bands. Planned and logged once a size.

        width, height: pixels; given: TuneConfig.memory_bytes
        If not even the smallest bands fit, it is these, with a warning: learning mostly needs more, and then refuses.
        """
        device, vae = self._unet.device, self._model.vae
        budget = given or self._memory_bytes or device_budget(device)
        if budget is None:
            return vae
        key = width, height, given
        if key not in self._encodings:
            self.release()  # its memory is there to be planned with
            needed = partial(VAECost(vae.config, 4, copies=device.type == "cpu").encode, height, width)
            self._encodings[key] = choose_rows(needed, height, budget - self._held())
            rows, peak = self._encodings[key]
            told = f"{show_bytes(self._held() + peak)} of {show_bytes(budget)}"
            level = logging.INFO if self._held() + peak <= budget else logging.WARNING
            log.log(level, "encode: %s; predicted at most: %s", in_words(rows), told)
        rows, peak = self._encodings[key]
        if device.type == "cpu" or self._held() + peak > budget:  # on a CPU nobody counts what learning keeps
            self.release()
        return vae if rows is None else BandedVAE(vae, rows)

    def learn(self, inputs: TuneInputs) -> Learned:
        """As Tuner.learn says; it writes the weights that edits are sampled on."""
        return self._tuner.learn(inputs)

    def release(self) -> None:
        """Let go of what only learning needs."""
        self._tuner.release()

    def shrink(self) -> bool:
        """After the device ran out of memory: let go of all buffers, and take half as many edits at once from here on.

        Returns: False if it was one at a time already
        """
        self.release()
        self._sampler.clear()
        if self._unet.device.type == "cuda":
            torch.cuda.empty_cache()
        smaller, self._most = self._most > 1, max(self._most // 2, 1)
        return smaller

    def load(self, owner: object, tuned: Mapping[str, Tensor], strategy: str, keep: float) -> None:
        """As Reference.load says; only weights that differ from what is there are written."""
        self._weights.load(owner, tuned, strategy, keep)

    def blend(self, source: Tensor, target: Tensor, configs: Sequence[EditConfig]) -> Tensor:
        """As Reference.blend says, in one launch."""
        weights = torch.tensor([blend_weights(config) for config in configs], device=source.device)
        backend = backend_for("blend_embeddings", self._backend)
        return blend_embeddings(source, target, weights, backend=backend)

    def sample(
        self,
        embeddings: Tensor,
        unconditional: Tensor,
        shape: tuple[int, int, int],
        configs: Sequence[EditConfig],
        on_step: Callable[[int, int, float | None], None],
    ) -> Tensor:
        """Latents [B, C, h, w] of configs that differ in blend and seed alone."""
        schedule = self._schedule(configs[0].scheduler, configs[0].num_steps)
        noises = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(config.seed)) for config in configs]
        start = torch.cat(noises).to(embeddings.device)
        return self.follow(schedule, start, embeddings, unconditional, configs[0].guidance_scale, on_step)

    def follow(
        self,
        schedule: Schedule,
        start: Tensor,
        embeddings: Tensor,
        unconditional: Tensor,
        guidance_scale: float,
        on_step: Callable[[int, int, float | None], None],
    ) -> Tensor:
        """Latents [B, C, h, w] after a schedule that begins with `start`, likewise; see Sampler.sample."""
        return self._sampler.sample(
            embeddings=embeddings,
            unconditional=unconditional,
            noise=start,
            schedule=schedule,
            guidance_scale=guidance_scale,
            version=self._weights.version,
            on_step=on_step,
        )

    @torch.no_grad()
    def predict(self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """As Reference.predict says, with the weights that were loaded last; nothing is captured."""
        unet, alphas = self._unet, self._model.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        prompts = len(embeddings)
        rows = noisy.to(unet.dtype).repeat(prompts, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        times = unet.project_timesteps(timesteps).repeat(prompts, 1)  # the UNet shares a row among prompts only if all
        projected = unet.project_prompts(embeddings.repeat_interleave(len(noisy), dim=0))  # are at one timestep
        answers = unet(rows, times, projected).float().unflatten(0, (prompts, len(noisy)))
        return clean_and_noise(noisy, answers, alphas, self._model.prediction_type)[1]

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents [B, C, h, w], as planned for their shape: in bands they are decoded one by one.

        Raises: RuntimeError if no plan of that shape fits
        """
        _, channels, height, width = latents.shape
        self.max_edits((channels, height, width))
        rows = self._plans[channels, height, width].decode_rows
        vae, together = (self._vae, DECODE_TOGETHER) if rows is None else (BandedVAE(self._vae, rows), 1)
        return [image for part in latents.split(together) for image in decode_latents(part, vae).images]

    def reset(self) -> None:
        """Nothing: the working UNet is not this one's."""

    def _schedule(self, scheduler: str, num_steps: int) -> Schedule:
        key, model = (scheduler, num_steps), self._model
        if key not in self._schedules:
            if scheduler == "ddim":
                self._schedules[key] = ddim_schedule(model.alphas_cumprod, num_steps, model.prediction_type)
            else:
                make = partial(make_scheduler, scheduler, model.alphas_cumprod, model.prediction_type, num_steps)
                self._schedules[key] = solver_schedule(make().timesteps, make)
        return self._schedules[key]


def blend_weights(config: EditConfig) -> tuple[float, float, float]:
    """The row of blend_embeddings' weights that says what config.blend says (METHOD section 3)."""
    if config.blend == "vs":
        return 1 - config.gamma, config.gamma, 0.0
    return config.identity_weight, config.edit_weight, 1.0
