"""Photos learned one after another: the way chosen by numerics and memory, and changed where it fails."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forgedit.engine.learner import DTYPES, Learner
from forgedit.engine.parking import Parking
from forgedit.engine.plan import device_budget, show_bytes
from forgedit.engine.tune_inputs import Learned, TuneInputs
from forgedit.engine.tune_plan import MODES, PassCost, Way, choose_way, ladder, predicted_bytes
from forgedit.engine.weights import ResidentWeights, lay_out
from forgedit.errors import TuneDiverged
from forgedit.model import Model
from forgedit.model.fuse import FusedUNet

log = logging.getLogger("forgedit")


class Tuner:
    """Learns photos in buffers that stay; of learners, each for one set of rates and one way, the last is kept.

    original: float32 weights by name, prefixed; numerics: of the editor, whose mode 'auto' follows
    unet, weights: what edits are sampled on, trained too where a mode computes in its dtype
    backend: of forgedit_kernels, for every op that has it; memory_bytes: as the editor's
    parking: of the model's weights; None where nothing is ever parked
    """

    def __init__(
        self,
        model: Model,
        original: Mapping[str, Tensor],
        numerics: str,
        unet: FusedUNet,
        weights: ResidentWeights,
        backend: str,
        memory_bytes: int | None = None,
        parking: Parking | None = None,
    ) -> None:
        self._memory_bytes, self._parking = memory_bytes, parking
        self._model, self._original, self._backend = model, original, backend
        self._mode = "exact" if numerics == "exact" else "fast"
        self._unets = {unet.dtype: (unet, weights)}
        self._shared = unet
        self._learner: tuple[object, Learner] | None = None
        self._passes: dict[object, PassCost] = {}
        self._planned: dict[object, Way] = {}
        self.way: Way | None = None  # of the last photo
        self.predicted: int | None = None  # bytes at most, of the last plan

    def learn(self, inputs: TuneInputs) -> Learned:
        """As Learner.learn, by the way that config.mode and config.memory_bytes, or the device's memory, allow.

        A loss that is not finite has the photo learned once more, in the next safer
        mode; where memory runs out, the next smaller way goes on. Both are logged, and begin from the first step.
        Raises: TuneDiverged; RuntimeError if no way fits
        """
        config, latents = inputs.config, inputs.latents
        ways, start, retried = self._ways(inputs), inputs.generator.get_state(), False
        given = config.memory_bytes or self._memory_bytes
        budget = given or device_budget(latents.device)
        # planned once, as what the first photo left behind would count against the second
        plan = (tuple(ways), tuple(inputs.names), config.num_steps, latents.shape, given)
        if plan not in self._planned:
            way = ways[0] if budget is None else self._plan(ways, inputs, budget)
            self._planned[plan] = way
        way = self._planned[plan]
        while True:
            inputs.generator.set_state(start)
            try:
                with self._room(way, inputs):
                    return self._prepare(way, inputs).learn(inputs)
            except TuneDiverged as error:
                safer = MODES[max(MODES.index(way.mode) - 1, 0)]
                if retried or safer == way.mode or config.mode != "auto":
                    raise
                log.warning("mode %s diverged (%s); once more in mode %s", way.mode, error, safer)
                way, retried = replace(way, mode=safer), True
                self.release()
            except torch.OutOfMemoryError:
                smaller = ways[ways.index(way) + 1 :] if way in ways else []
                if not smaller:
                    raise RuntimeError(
                        f"learning this photo does not fit into the device's memory ({way}); take a smaller width and "
                        "height, or a device with more"
                    ) from None
                log.warning("the device ran out of memory in %s; going on in %s", way, smaller[0])
                self.release()
                way = self._planned[plan] = smaller[0]

    def release(self) -> None:
        """Let go of everything on the device that only tuning needs."""
        self._drop_learner()
        self._drop_unets(but=self._shared.dtype)

    @contextmanager
    def _room(self, way: Way, inputs: TuneInputs) -> Iterator[None]:
        """Where the way says so, what is not learned is in host memory, and back when this ends, however it does."""
        if self._parking is None or not way.parked:
            yield
            return
        for _, weights in self._unets.values():
            weights.forget_plans()  # they hold the originals
        try:
            self._parking.park(but=_stays(inputs))
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the learner, whose room is needed below
            raise
        finally:
            self._drop_learner()
            self._empty_cache()
            self._parking.restore()

    def _drop_learner(self) -> None:
        self._learner = None
        for unet, _ in self._unets.values():
            for leaf in unet.leaves:
                leaf.tensor.grad = None

    def _drop_unets(self, but: torch.dtype) -> None:
        """All but the shared one, and the one of this dtype."""
        self._unets = {dtype: self._unets[dtype] for dtype in self._unets if dtype in (but, self._shared.dtype)}
        self._empty_cache()

    def _empty_cache(self) -> None:
        if self._shared.device.type == "cuda":
            torch.cuda.empty_cache()

    def _ways(self, inputs: TuneInputs) -> list[Way]:
        """The ladder down from the mode asked for; without a budget only its top is looked at."""
        config = inputs.config
        modes = MODES[MODES.index(self._mode) :] if config.mode == "auto" else [config.mode]
        return list(ladder(modes, config.batch_size, self._parkable(inputs) > 0))

    def _parkable(self, inputs: TuneInputs) -> int:
        """Bytes."""
        return 0 if self._parking is None else self._parking.num_bytes(_stays(inputs))

    def _plan(self, ways: Sequence[Way], inputs: TuneInputs, budget: int) -> Way:
        self.release()  # its memory is there to be planned with
        config, latents, model = inputs.config, inputs.latents, self._model
        trained = [self._original[name] for name in inputs.names]
        size = sum(w.numel() for w in model.unet.parameters())
        if latents.is_cuda:
            held = torch.cuda.memory_allocated(latents.device)
        else:
            parts = (model.unet, model.vae, model.text_encoder, model.captioner)
            held = sum(w.nbytes for part in parts if part is not None for w in part.parameters())
            held += size * self._shared.dtype.itemsize

        parkable = self._parkable(inputs)

        def predict(way: Way, passing: PassCost | None = None) -> int:
            laid_out = 0 if DTYPES[way.mode] == self._shared.dtype else size * DTYPES[way.mode].itemsize
            passing = passing or self._pass_cost(way, inputs)
            return predicted_bytes(
                way,
                trained,
                config,
                latents[0].numel(),
                passing,
                held=held + laid_out,
                parkable=parkable,
                photos=len(latents),
            )

        # a way that does not fit even without a pass is not tried where a parked one follows: measuring takes room too
        hopeful = (way for way in ways if way.parked or not parkable or predict(way, PassCost(0, 0, 0.0)) <= budget)
        way, needed = choose_way(hopeful, predict, budget)
        self.predicted = needed
        self._drop_unets(but=DTYPES[way.mode])  # what only ways that do not fit would have needed
        rows = config.num_steps * config.batch_size
        seconds = rows * self._pass_cost(way, inputs).row_seconds
        peak = f"{show_bytes(needed)} of {show_bytes(budget)}"
        log.info("tune: %s; predicted at most: %s, some %.0f s", way, peak, seconds)
        if config.mode == "auto" and way.mode != self._mode:
            log.warning("mode %s does not fit into %s; the photo is learned in %s", self._mode, show_bytes(budget), way)
        return way

    def _pass_cost(self, way: Way, inputs: TuneInputs) -> PassCost:
        """Measured once for each dtype, size and way of checkpointing; gradients of weights are let go at once."""
        key = (DTYPES[way.mode], way.checkpointing, inputs.latents.shape[1:], tuple(inputs.names))
        if key not in self._passes:
            with self._room(way, inputs):
                self._passes[key] = self._measured(way, inputs)
        return self._passes[key]

    def _measured(self, way: Way, inputs: TuneInputs) -> PassCost:
        unet, _ = self._unet(DTYPES[way.mode])
        mine = {name.removeprefix("unet.") for name in inputs.names}
        leaves = [leaf.tensor for leaf in unet.leaves_of(mine)]
        source = inputs.embedding.detach().clone().requires_grad_()

        def run(rows: int) -> None:
            noisy = inputs.latents[:1].expand(rows, -1, -1, -1).to(unet.dtype, memory_format=torch.channels_last)
            timesteps = torch.zeros(rows, dtype=torch.int64, device=unet.device)
            unet.predict(noisy, timesteps, source).float().square().mean().backward()

        hooks = [leaf.requires_grad_().register_post_accumulate_grad_hook(_let_go) for leaf in leaves]
        unet.checkpointing = way.checkpointing
        try:
            return PassCost.measured(run, unet.device)
        finally:
            unet.checkpointing = False
            for leaf, hook in zip(leaves, hooks, strict=True):
                hook.remove()
                leaf.requires_grad_(False)

    def _unet(self, dtype: torch.dtype) -> tuple[FusedUNet, ResidentWeights]:
        if dtype not in self._unets:
            device = self._shared.device  # the model's UNet may be parked now
            self._unets[dtype] = lay_out(self._model.unet, dtype, self._original, self._backend, device)
        return self._unets[dtype]

    def _prepare(self, way: Way, inputs: TuneInputs) -> Learner:
        """The learner, its UNet holding the originals."""
        config, names = inputs.config, inputs.names
        rates = (config.profile, config.batch_size, config.unet_lr, config.embedding_lr, config.text_encoder_lr)
        key = (way, *rates, config.eps, config.loss_scale)
        unet, weights = self._unet(DTYPES[way.mode])
        weights.restore()
        if self._learner is None or self._learner[0] != key:
            self._drop_learner()  # before the next is made: they need not fit side by side
            text: Any = self._model.text_encoder
            learner = Learner(unet, self._original, text, names, config, way, backend=self._backend)
            self._learner = key, learner
        weights.expect_writes(name for name in names if name.startswith("unet."))
        self.way = way
        return self._learner[1]


def _stays(inputs: TuneInputs) -> tuple[str, ...]:
    """How the names of weights begin that are not parked: the text encoder where a copy of it is trained."""
    return ("text_encoder.",) if any(name.startswith("text_encoder.") for name in inputs.names) else ()


def _let_go(tensor: Tensor) -> None:
    tensor.grad = None
