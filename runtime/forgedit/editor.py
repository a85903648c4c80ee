"""The editor: owns one model and runs the stages in order.

Longer than most files, as every public call stands here with all that it promises; what they do is elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from forgedit.config import EditConfig, TuneConfig
from forgedit.engine.batch import Leg, Travelled, expected_seconds, in_batches, make_batch, travel, warm_up
from forgedit.engine.difference import noise_difference
from forgedit.engine.graphs import GraphCache
from forgedit.engine.numerics import check_numerics, true_float32, warn_where_slow
from forgedit.engine.parking import Parking
from forgedit.engine.reference import Reference
from forgedit.engine.resident import Resident
from forgedit.engine.stats import Stats, check_deadline
from forgedit.errors import ModelError
from forgedit.learning import learn_subject, open_subject, trained_names
from forgedit.model import Model, load_model, model_from_pipe
from forgedit.progress import OnStep, Progress
from forgedit.prompts import Prompts
from forgedit.quality.change_mask import ChangeMask, heat_map
from forgedit.quality.report import peak_bytes, versions
from forgedit.session import Edit, Session, read_session
from forgedit.session_file import base_fingerprint
from forgedit.stages.caption import caption_photo
from forgedit.stages.encode import check_prompt, check_target, encode_image, encode_prompt
from forgedit.stages.photo import Photo, composite_photo, open_photo
from forgedit.turns import Turns
from forgedit.weights import Weights
from forgedit_kernels import available_backends


class Editor:
    """One model, ready to learn photos. Its sessions share one working UNet and are served one at a time.

    Safe from several threads: a call waits for its turn. No state is shared between editors, or left in torch's.

    model: the parts, this editor's own modules; between calls the working weights are the originals or one session's
    backend: of forgedit_kernels; an op that does not have the one named chooses for itself
    numerics: what edits compute in. 'exact': our engine in float32; 'fast', 'fast-float16': the same in bfloat16 or
        float16 (tuning in bfloat16); 'reference': the method's plain path, slower
    memory_bytes: what may be held on the device, everything loaded included; decides how many edits are made together,
        how a photo is learned (TuneConfig.memory_bytes stands above it there), and whether photos are encoded and
        pictures decoded whole or in bands. None takes what there is, on a CPU a fixed number of edits
    shared_with: modules of yours that hold some of the model's memory too; that stays on the device where, for want of
        memory, the rest waits on the host while a photo is learned
    defaults: the settings the model recommends, taken where a call names none
    Raises: ValueError for a backend that cannot run here, or unknown numerics
    """

    def __init__(
        self,
        model: Model,
        backend: str = "auto",
        numerics: str = "exact",
        memory_bytes: int | None = None,
        shared_with: Iterable[Any] = (),
    ) -> None:
        check_numerics(numerics)
        warn_where_slow(numerics, model.alphas_cumprod.device)
        available = available_backends(model.alphas_cumprod.device)
        if backend not in ("auto", *available):
            raise ValueError(f"backend {backend!r} cannot run here; expected one of: auto, {', '.join(available)}")
        self.model = model
        self.defaults = model.defaults
        if numerics == "reference":  # which samples as the method does alone
            plain = replace(model.defaults.choose, scheduler=None, num_steps=None)
            self.defaults = replace(model.defaults, choose=plain)
        self.backend = available[0] if backend == "auto" else backend
        self.numerics = numerics
        self._told, self._memory_bytes = backend, memory_bytes
        self._weights = Weights(model.unet, model.text_encoder)
        shared = {tensor.data_ptr() for module in shared_with for tensor in module.parameters()}
        self._parking = Parking(self._weights, [model.vae, model.captioner], shared)
        self._prompts = Prompts(model, self._weights)
        self._path: Reference | Resident | None = None  # made by the first edit
        self._fingerprint: str | None = None
        self._turns = Turns()
        self._graphs = GraphCache(model.alphas_cumprod.device)
        self._stats = Stats(self._graphs)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "bundled",
        device: str = "cpu",
        backend: str = "auto",
        captioner: str | Path | None = None,
        tokenizer: str | Path | None = None,
        prediction_type: str | None = None,
        numerics: str = "exact",
        memory_bytes: int | None = None,
        scorer: str | Path | None = None,
    ) -> Editor:
        """Load a Stable Diffusion 1.x or 2.x, safetensors only, in float32.

        name: 'bundled'; a folder in diffusers' layout; a hub id 'owner/name', from the local cache if it is there; or a
            *.safetensors file in Stable Diffusion's original names, which needs a tokenizer
        device: a torch device string; backend: 'auto', or one of forgedit_kernels.available_backends
        captioner: folder or hub id of a BLIP (BlipForConditionalGeneration); None takes the model folder's captioner/
        tokenizer: folder or hub id of CLIP's tokenizer; None takes the model's own, see load_model
        prediction_type: 'epsilon' or 'v_prediction'; None takes what the model says
        numerics: 'exact', 'fast', 'fast-float16' or 'reference'; memory_bytes: see Editor for both
        scorer: folder or hub id of a CLIP (CLIPModel), read when an edit is first scored; None takes the model folder's
            scorer/
        Raises: ModelError for any of them, saying what would help; ValueError for the backend or the numerics
        """
        check_numerics(numerics)
        model = load_model(name, device, captioner, tokenizer, prediction_type, scorer)
        return cls(model, backend, numerics, memory_bytes)

    @classmethod
    def from_pipe(
        cls,
        pipe: Any,
        captioner: Any = None,
        processor: Any = None,
        backend: str = "auto",
        numerics: str = "exact",
        memory_bytes: int | None = None,
    ) -> Editor:
        """An editor over a loaded diffusers StableDiffusionPipeline, on its device, weights shared.

        The pipe stays as it is, and can be used meanwhile: the editor has its own modules, and of the weights only what
        a tune or an edit is changing exists twice. Do not write the pipe's weights in place while the editor lives.
        What is not float32 and contiguous, such as a half-precision pipe, is copied, as the method computes in float32.

        captioner, processor: a loaded BlipForConditionalGeneration and its BlipProcessor, shared likewise; without
            them each tune needs TuneConfig.caption
        backend, numerics, memory_bytes: as from_pretrained takes them
        Raises: ModelError for another kind of pipe, or one offloaded, quantised, compiled or with a LoRA; ValueError
            for the backend, the numerics, or a captioner without a processor
        """
        model = model_from_pipe(pipe, captioner, processor)
        theirs = [pipe.unet, pipe.vae, pipe.text_encoder, *([] if captioner is None else [captioner])]
        return cls(model, backend, numerics, memory_bytes, shared_with=theirs)

    def caption(self, photo: Photo, target: str = "") -> str:
        """The captioner's words for a photo; prefixed 'A photo of ' if the target contains that (METHOD item 2).

        photo: as tune takes it
        Raises: InputError for the photo, ModelError if the model has no captioner
        """
        image = composite_photo(open_photo(photo))
        with self._turn(Progress(None, None)):
            return self._caption(image, target)

    def tune(
        self,
        photo: Photo,
        config: TuneConfig | None = None,
        on_step: OnStep = None,
        cancel: threading.Event | None = None,
        target: str = "",
        embedding: Tensor | None = None,
        others: Sequence[Photo] = (),
    ) -> Session:
        """Learn one photo (METHOD sections 1, 2, 6).

        photo: a path to a JPEG, PNG or WebP, or a PIL image, read as open_photo says; config: None takes defaults.tune
        on_step: called with a StepEvent after each stage and each tuning step, in this thread; what it raises ends the
            tune; it may not call the editor
        cancel: once set, from any thread, the tune ends within one step; also while it waits for its turn
        target: the coming target if known; only decides the caption's prefix
        embedding: [1, T, D], where learning starts instead of the caption's, such as another session's. With all rates
            0 nothing is learned, at once, and the session is of the original weights
        others: experimental: more photos of the same subject, learned together with the first under its caption: the
            rows of each step's batch take the photos in turn. Those of another shape than the first are scaled to cover
            its edited size, and cut off evenly on both sides. Edits begin from noise and may come out placed as in any
            of the photos, so change_mask, keep_outside and choose, which compare with the first, say less of them
        Raises: InputError for the photo or the caption; ModelError without captioner and caption; TuneDiverged;
            Cancelled; ValueError for a profile that trains nothing of this UNet, or an embedding of another shape, or
            with a text encoder that is trained, or more photos than samples; RuntimeError from inside on_step.
            A tune that fails leaves the original weights.
        Source: Forgedit, arXiv 2309.10556, section 3.2
        """
        config, progress = config or self.defaults.tune, Progress(on_step, cancel)
        if config.caption is not None:
            check_prompt(config.caption, "caption")
        subject, names = open_subject([photo, *others]), trained_names(self._weights.working, config)
        with self._turn(progress):
            with progress.stage("caption"):
                caption = config.caption if config.caption is not None else self._caption(subject.images[0], target)
            path, restore = self._method_path, self._restore
            session = learn_subject(
                self, subject, caption, embedding, names, config, self._prompts, path, restore, progress
            )
        for stage, spent in session.seconds.items():
            self._stats.record(stage, spent)
        return session

    def encode(self, session: Session, pictures: Sequence[Image.Image]) -> Tensor:
        """Latents [N, C, h, w] of N pictures, for travel.

        pictures: RGB, of the size of session.source. Each is drawn from its posterior with the session's own seed, so
            that the photo's latents are those that were learned, and pictures that are alike have latents that are
        Raises: ValueError for a picture of another size, or another editor's session
        """
        self._check_owner(session)
        size = session.source.size
        for picture in pictures:
            if picture.size != size:
                raise ValueError(f"a picture has size {picture.size}; expected the session's, {size}, in pixels")
        with self._turn(Progress(None, None)):
            vae = self._method_path().encoder(*size, session.config.memory_bytes)
            seed = session.config.seed
            encoded = [encode_image(picture, vae, torch.Generator().manual_seed(seed)) for picture in pictures]
        return torch.cat([one.latents for one in encoded])

    def edit(
        self,
        session: Session,
        target: str,
        config: EditConfig | None = None,
        on_step: OnStep = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
    ) -> Edit:
        """Edit a tuned photo (METHOD sections 3 to 5); Session.edit calls this.

        target: what the edited photo should show; config: None takes defaults.edit; on_step, cancel: as in tune
        deadline_s: seconds from the call on; what cannot be done in that time, by the steps measured so far, is refused
            before it starts. The first edit of a size is never refused for its steps
        Raises: InputError for a target that is empty or has control characters; ValueError for a strategy that matches
            no tuned weight, or another editor's session; DeadlineExceeded; EditDiverged; Cancelled; RuntimeError from
            inside on_step. An edit that fails leaves the original weights.
        Source: Forgedit, arXiv 2309.10556, sections 3.3 and 3.4
        """
        (edit,) = self.edits(session, target, [config or self.defaults.edit], on_step, cancel, deadline_s)
        return edit

    def edits(
        self,
        session: Session,
        target: str,
        configs: Sequence[EditConfig],
        on_step: OnStep = None,
        cancel: threading.Event | None = None,
        deadline_s: float | None = None,
    ) -> Iterator[Edit]:
        """Yield one edit a config, in order, as they finish; Session.sweep calls this.

        session, target: as in edit
        configs: neighbours that differ in strength and seed alone are made together. Each such batch is one turn of
            the editor and one run of the stages; its seconds are shared out evenly among its edits
        on_step, cancel, Raises: as in edit, when the turn comes; what was finished before is yielded first
        deadline_s: for all of them; each batch is refused or started by the time that is left
        """
        check_target(target)
        self._check_owner(session)
        start, shape = time.perf_counter(), self.model.latent_shape(*session.source.size)

        def make(waiting: Sequence[EditConfig]) -> list[Edit]:
            progress = Progress(on_step, cancel)
            with self._turn(progress):
                path, stats, numerics = self._method_path(), self._stats, self.numerics
                batch = waiting[: path.max_edits(shape)]
                needed = expected_seconds(stats, batch, shape, numerics)
                check_deadline(deadline_s, needed, time.perf_counter() - start)
                prompt, nothing = (self._prompts.embed(session, words) for words in (target, ""))
                return make_batch(path, session, target, prompt, nothing, shape, batch, progress, stats, numerics)

        def shrink() -> bool:
            return self._path is not None and self._path.shrink()

        yield from in_batches(configs, session.source.size, make, shrink)

    def travel(
        self,
        session: Session,
        start: Tensor,
        legs: Sequence[Leg],
        strategy: str = "none",
        keep: float = 0.0,
        on_step: OnStep = None,
        cancel: threading.Event | None = None,
    ) -> Travelled:
        """Take latents along schedules of your own, one after another: what other methods are made of.

        session: whose UNet it is, forgotten as strategy and keep say
        start: [B, C, h, w] float32 on the model's device, of the noise level at which the first leg begins; as many of
            them go together as edits do
        legs: each a schedule with its prompt and guidance; on_step, cancel: as in edit
        Raises: ValueError for the strategy, or another editor's session; EditDiverged; Cancelled; RuntimeError from
            inside on_step
        """
        self._check_owner(session)
        progress = Progress(on_step, cancel)
        with self._turn(progress):
            words = [None if leg.prompt is None else self._prompts.embed(session, leg.prompt) for leg in legs]
            prompts = [session.embedding if prompt is None else prompt.embedding for prompt in words]
            nothing = self._prompts.embed(session, "").embedding
            path = self._method_path()
            return travel(path, session, start, legs, prompts, nothing, strategy, keep, progress)

    def change_mask(self, session: Session, edit: Edit) -> ChangeMask:
        """Where an edit changed its photo (quality/change_mask.py); Session.change_mask calls this.

        session: the one that made the edit. It costs the photo's encoding and 6 rows of the UNet; a guided edit of 50
        steps costs 100
        Raises: ValueError for another editor's session, or an edit of another size
        """
        self._check_owner(session)
        with self._turn(Progress(None, None)):
            prompt = self._prompts.embed(session, edit.target)
            difference = noise_difference(self._method_path(), self.model, session, prompt, edit.config)
        return ChangeMask.found(heat_map(difference, edit.image, session.source))

    def warmup(self, sizes: Iterable[tuple[int, int]] | None = None, config: EditConfig | None = None) -> None:
        """Do beforehand what the first edit of a size pays for: lay the engine out, compile kernels, capture graphs.

        sizes: widths and heights of edited pictures, pixels; None for the model's own
        config: None takes defaults.edit; only its guidance and scheduler matter
        Raises: ValueError for a size the model cannot edit; RuntimeError if it does not fit into memory
        """
        config = config or self.defaults.edit
        for width, height in sizes or [(self.model.resolution, self.model.resolution)]:
            shape = self.model.latent_shape(width, height)
            with self._turn(Progress(None, None)):
                nothing = encode_prompt(self._prompts.tokens("")[0], self.model.text_encoder)
                weight = {"unet.conv_in.weight": self._weights.original["unet.conv_in.weight"]}
                path = self._method_path()
                path.max_edits(shape)  # planned before the buffers of the first edit are there
                warm_up(path, nothing, weight, shape, config)

    def release(self) -> None:
        """Let go of what only learning needs and keeps for the next photo: masters, gradients, moments, graphs."""
        with self._turn(Progress(None, None)):
            if self._path is not None:
                self._path.release()
            self._parking.release()

    def stats(self) -> dict[str, Any]:
        """What this editor has measured so far, for JSON.

        Returns: 'stages': seconds at p50, p95, p99, and counts, of 'caption', 'encode', 'tune', 'blend', 'forget',
            'step' and 'decode'; 'graphs': hits, misses and failures; 'peak_bytes': the most memory held
        """
        self._stats.note_peak(max(held for held in peak_bytes(self.model.alphas_cumprod.device).values() if held))
        return self._stats.snapshot()

    def load_session(self, path: str | Path) -> Session:
        """Read a session saved by Session.save. Everything is checked first; no weight of the editor is touched.

        path: of the safetensors file
        Raises: SessionError for a file that is truncated, altered, of an unknown version, or of another base model;
            OSError if it cannot be read
        """
        return read_session(self, Path(path))

    def info(self) -> dict[str, Any]:
        """Model, resolution in pixels, prediction type, device, backend, parameter counts, versions."""
        return {
            **self.model.describe(),
            "backend": self.backend,
            "numerics": self.numerics,
            "versions": versions(),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the original UNet, text encoder and VAE, noise schedule and prediction type; computed once."""
        if self._fingerprint is None:
            others = {f"vae.{name}": weight for name, weight in self.model.vae.state_dict().items()}
            others["alphas_cumprod"] = self.model.alphas_cumprod
            self._fingerprint = base_fingerprint(self._weights.original | others, self.model.prediction_type)
        return self._fingerprint

    def originals(self) -> dict[str, Tensor]:
        """The original weights by name, prefixed 'unet.' or 'text_encoder.'; not to be written to.

        They may lie in host memory, while another thread learns a photo for want of the device's.
        """
        return dict(self._weights.original)

    def _caption(self, image: Image.Image, target: str) -> str:
        if self.model.captioner is None:
            raise ModelError("this model has no captioner/; give the photo's caption yourself (TuneConfig.caption)")
        return caption_photo(image, self.model.captioner, self.model.processor, target)

    def _check_owner(self, session: Session) -> None:
        if session.editor is not self:
            raise ValueError("the session belongs to another editor; save it, and load it with this one's load_session")

    def _method_path(self) -> Reference | Resident:
        """Where edits are made; the engine is laid out by the first edit, from the originals."""
        if self._path is None:
            if self.numerics == "reference":
                self._path = Reference(self.model, self._weights, self.backend, self._graphs)
            else:
                self._weights.restore()
                on_gpu = self.model.alphas_cumprod.device.type == "cuda"
                self._path = Resident(
                    self.model,
                    self._weights.original,
                    self.numerics,
                    self._told,
                    self._graphs,
                    self._memory_bytes,
                    parking=self._parking if on_gpu else None,  # a CPU's memory is the host's
                )
        return self._path

    def _restore(self) -> None:
        if self._path is not None:
            self._path.reset()
        self._parking.restore()  # what a tune could not bring back, as the device was full
        self._weights.restore()

    @contextmanager
    def _turn(self, progress: Progress) -> Iterator[None]:
        """One thread's turn at the model; if what it does fails, the working weights are the originals again."""
        with self._turns.take(progress), true_float32():
            finished = False
            try:
                yield
                finished = True
            finally:
                if not finished:
                    self._restore()
