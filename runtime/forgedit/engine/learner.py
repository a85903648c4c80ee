"""The tuning engine: METHOD sections 2 and 6 on the engine's UNet, one photo after another in the same buffers.

A step is two pieces of work on fixed buffers, each of which a CUDA graph captures once: gradients (zero, forward,
backward) and update (the optimizer). Nothing waits for the device between steps until the first at which the early stop
can be decided; from there on the loss is read between the two, so that the stop is exact.

In mode 'lean' the moments are 8-bit, and a gradient is applied and freed where the backward pass has just made it. Then
the loss that decides the stop comes from a forward pass of its own, as nothing could be taken back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from forgedit.config import TuneConfig
from forgedit.engine.graphs import GraphCache
from forgedit.engine.parking import HOST
from forgedit.engine.tune_inputs import Learned, TuneInputs, draw
from forgedit.engine.tune_plan import Way
from forgedit.errors import TuneDiverged
from forgedit.model.fuse import FusedUNet
from forgedit.stages.tune import first_stop
from forgedit_kernels import Adam8bitPlan, AdamPlan, backend_for

DTYPES = {"exact": torch.float32, "fast": torch.bfloat16, "lean": torch.bfloat16}


@dataclass(frozen=True)
class _Rows:
    """What one pass of the UNet over some rows of the batch reads and writes; losses: one a row, float32."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    losses: Tensor


class Learner:
    """Learns photos on one UNet, whose weights it writes; between two photos only values change.

    unet: its weights are those to begin with whenever learn is called; nobody else uses it meanwhile
    original: float32 weights by name, prefixed 'unet.' or 'text_encoder.', never written
    text_encoder: a copy is read and trained if names has weights of it
    names: the weights to train, prefixed; rates and eps: of Adam, from config. The embedding is not trained at rate 0
    way: its micro_batch is a divisor of config.batch_size
    backend: of forgedit_kernels, for the optimizer
    Raises: ValueError for a micro_batch that is no divisor, or a UNet of another dtype than the mode's
    """

    def __init__(
        self,
        unet: FusedUNet,
        original: Mapping[str, Tensor],
        text_encoder: Any,
        names: Sequence[str],
        config: TuneConfig,
        way: Way,
        backend: str = "auto",
        graphs: GraphCache | None = None,
    ) -> None:
        if config.batch_size % way.micro_batch:
            raise ValueError(
                f"micro_batch {way.micro_batch} is out of range; expected a divisor of {config.batch_size}"
            )
        if unet.dtype != DTYPES[way.mode]:
            raise ValueError(f"mode {way.mode!r} computes in {DTYPES[way.mode]}, got a UNet in {unet.dtype}")
        self.unet, self.way = unet, way
        self._original, self._names = original, list(names)
        self._graphs = graphs if graphs is not None else GraphCache(unet.device)
        mine = [name.removeprefix("unet.") for name in names if name.startswith("unet.")]
        self._leaves = unet.leaves_of(mine)
        self._weights = {name: unet.weights[name].detach() for name in mine}
        half = unet.dtype != torch.float32
        self._masters = {name: w.float() if half else w for name, w in self._weights.items()}
        trains_text = any(name.startswith("text_encoder.") for name in names)
        self._text: Any = copy.deepcopy(text_encoder) if trains_text else None
        self._embedding: Tensor | None = None  # made by the first photo, whose embedding has its shape
        self._rows: dict[tuple[int, ...], _Rows] = {}
        self._make_plan: Callable[..., AdamPlan | Adam8bitPlan]
        if way.mode == "lean":
            told = backend_for("adam8bit", backend)
            self._make_plan = partial(Adam8bitPlan, eps=config.eps, backend=told, bounded=True)
        else:
            self._make_plan = partial(AdamPlan, eps=config.eps, backend=backend_for("adam", backend))
        self._scale, self._batch = config.loss_scale, config.batch_size
        self._rates = config.unet_lr, config.text_encoder_lr if self._text is not None else config.embedding_lr
        self._frees = way.mode == "lean"
        for leaf in self._leaves:
            leaf.tensor.grad = None if self._frees else torch.zeros_like(leaf.tensor)
        grads = None if self._frees else self._gradient_parts()
        self._unet_plan = self._make_plan(
            self._masters.values(), grads, lr=self._rates[0], copies=self._weights.values() if half else None
        )
        self._text_plan: AdamPlan | Adam8bitPlan | None = None
        self._text_parameters: list[Tensor] = []

    def learn(self, inputs: TuneInputs) -> Learned:
        """Learn one photo, as stages.tune.tune says.

        inputs: names are this learner's; config differs from the one it was made for in seed and steps at most
        Raises: TuneDiverged if a loss is not finite
        """
        latents, config = inputs.latents, inputs.config
        steps, batch = config.num_steps, self._batch
        noisy, timesteps, target = draw(
            latents, inputs.alphas_cumprod, inputs.prediction_type, config, inputs.generator
        )
        self._begin(inputs.embedding, inputs.token_ids)
        losses = torch.zeros(steps, batch, device=latents.device)
        wait_from = first_stop(config) if latents.is_cuda else 0
        stopped_early, step = False, 0
        self._require_gradients(True)
        try:
            for step in range(steps):
                decides = step >= first_stop(config)
                parts = list(
                    zip(*(x[step].split(self.way.micro_batch) for x in (noisy, timesteps, target)), strict=True)
                )
                if self._frees and decides:  # what is applied at once cannot wait for the loss
                    self._pass(parts, losses[step], gradients=False)
                else:
                    self._pass(parts, losses[step])
                loss = losses[step].mean().item() if step >= wait_from else None
                if loss is not None and not math.isfinite(loss):
                    raise TuneDiverged(f"the loss became {loss} at step {step} of {steps}; lower unet_lr")
                stopped_early = decides and loss is not None and loss < config.loss_threshold
                if not stopped_early:
                    if self._frees and decides:
                        self._pass(parts, losses[step])
                    self._update()
                inputs.on_step(step + 1, steps, loss)
                if stopped_early:
                    break
        finally:
            self._require_gradients(False)
        values = losses[: step + 1].mean(dim=1).tolist()
        if not all(map(math.isfinite, values)):
            bad = next(index for index, value in enumerate(values) if not math.isfinite(value))
            raise TuneDiverged(f"the loss became {values[bad]} at step {bad} of {steps}; lower unet_lr")
        learned = {f"unet.{name}": w for name, w in self._masters.items()}
        if self._text is not None:
            learned |= {f"text_encoder.{name}": w.detach() for name, w in self._text.named_parameters()}
        place = HOST if self.way.parked else self.unet.device
        own = partial(Tensor.to, device=place, copy=True, memory_format=torch.contiguous_format)
        with torch.no_grad():
            source = self._source().detach().clone()
        tuned = {name: own(learned[name]) for name in self._names}
        return Learned(source, tuned, tuple(values), stopped_early, str(self.way))

    def _begin(self, embedding: Tensor, token_ids: Tensor) -> None:
        """Everything as before the first step."""
        names = list(self._masters)
        if names and self.unet.dtype != torch.float32:
            torch._foreach_copy_(
                [self._masters[name] for name in names], [self._original[f"unet.{name}"] for name in names]
            )
        if self._embedding is None:
            self._embedding, self._token_ids = embedding.detach().clone(), token_ids.clone()
            if self._rates[1]:
                self._text_parameters = [self._embedding] if self._text is None else list(self._text.parameters())
            for parameter in self._text_parameters:
                parameter.grad = torch.zeros_like(parameter)
            grads = [parameter.grad for parameter in self._text_parameters]
            values = [parameter.detach() for parameter in self._text_parameters]
            self._text_plan = self._make_plan(values, grads, lr=self._rates[1])
        else:
            self._embedding.detach().copy_(embedding)
            self._token_ids.copy_(token_ids)
            if self._text is not None:
                for name, parameter in self._text.named_parameters():
                    parameter.detach().copy_(self._original[f"text_encoder.{name}"])
            assert self._text_plan is not None
            self._text_plan.reset()
        self._unet_plan.reset()

    def _require_gradients(self, wanted: bool) -> None:
        for tensor in self._trained():
            tensor.requires_grad_(wanted)
        self.unet.checkpointing = wanted and self.way.checkpointing

    def _pass(self, parts: Iterable[tuple[Tensor, ...]], losses: Tensor, gradients: bool = True) -> None:
        """Losses [B] of one step's batch, and its gradients, which `lean` applies. parts: of draw's results."""
        last = self._batch // self.way.micro_batch - 1
        for index, (values, row_losses) in enumerate(zip(parts, losses.split(self.way.micro_batch), strict=True)):
            rows = self._buffers(values)
            for buffer, value in zip((rows.noisy, rows.timesteps, rows.target), values, strict=True):
                buffer.copy_(value)
            key = (*rows.noisy.shape, gradients, index == 0, index == last)
            work = partial(self._gradients, rows, index == 0, index == last) if gradients else partial(self._loss, rows)
            self._graphs.run(key, work)
            row_losses.copy_(rows.losses)

    def _buffers(self, values: tuple[Tensor, ...]) -> _Rows:
        noisy, timesteps, target = values
        key = tuple(noisy.shape)
        if key not in self._rows:
            self._rows[key] = _Rows(
                torch.empty_like(noisy, dtype=self.unet.dtype, memory_format=torch.channels_last),
                torch.empty_like(timesteps),
                torch.empty_like(target),
                torch.empty(len(noisy), device=noisy.device),
            )
        return self._rows[key]

    def _source(self) -> Tensor:
        if self._text is None:
            assert self._embedding is not None
            return self._embedding
        source: Tensor = self._text(self._token_ids).last_hidden_state
        return source

    def _forward(self, rows: _Rows) -> Tensor:
        """Losses [b], one a row."""
        answer = self.unet.predict(rows.noisy, rows.timesteps, self._source())
        return mse_loss(answer.float(), rows.target, reduction="none").mean(dim=(1, 2, 3))

    @torch.no_grad()
    def _loss(self, rows: _Rows) -> None:
        rows.losses.copy_(self._forward(rows))

    def _gradients(self, rows: _Rows, first: bool, last: bool) -> None:
        if first:
            held = [tensor.grad for tensor in self._trained() if tensor.grad is not None]
            if held:  # else torch refuses
                torch._foreach_zero_(held)
        losses = self._forward(rows)
        rows.losses.copy_(losses.detach())
        hooks = self._apply_as_they_come() if self._frees and last else []
        try:
            (losses.sum() / self._batch * self._scale).backward()
        finally:
            for hook in hooks:
                hook.remove()

    def _apply_as_they_come(self) -> list[Any]:
        """For this backward pass: each gradient updates its weights, and is let go."""
        self._unet_plan.advance()
        places = {name: index for index, name in enumerate(self._weights)}

        def apply(parts: Mapping[str, slice], tensor: Tensor) -> None:
            assert tensor.grad is not None
            for name, part in parts.items():
                if name in places:
                    self._unet_plan.apply(places[name], tensor.grad[part])
            tensor.grad = None

        return [leaf.tensor.register_post_accumulate_grad_hook(partial(apply, leaf.parts)) for leaf in self._leaves]

    def _update(self) -> None:
        def update() -> None:
            if not self._frees:
                self._unet_plan.run()
            assert self._text_plan is not None
            self._text_plan.run()

        self._graphs.run("update", update)

    def _trained(self) -> list[Tensor]:
        """What autograd is asked about."""
        return [*(leaf.tensor for leaf in self._leaves), *self._text_parameters]

    def _gradient_parts(self) -> list[Tensor]:
        """Of the leaves' gradients the rows of each trained weight, in the weights' order."""
        found = {}
        for leaf in self._leaves:
            assert leaf.tensor.grad is not None
            found.update({name: leaf.tensor.grad[part] for name, part in leaf.parts.items()})
        return [found[name] for name in self._weights]
