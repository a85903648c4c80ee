"""The editor: owns one model and runs the stages in order."""

from __future__ import annotations

import logging
import platform
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgedit.config import EditConfig, TuneConfig
from forgedit.errors import ModelError
from forgedit.model import Model, load_model
from forgedit.progress import OnStep, Progress
from forgedit.session import Edit, Session, base_fingerprint, read_session
from forgedit.stages.blend import blend_embeddings
from forgedit.stages.caption import caption_photo
from forgedit.stages.decode import decode_latents
from forgedit.stages.encode import check_prompt, check_target, encode_image, encode_prompt, resize_photo, tokenize
from forgedit.stages.forget import forget_weights
from forgedit.stages.photo import Photo, composite_photo, open_photo
from forgedit.stages.sample import sample_ddim
from forgedit.stages.tune import tune
from forgedit_kernels import available_backends

log = logging.getLogger("forgedit")


class Editor:
    """One model, ready to learn photos. Its sessions share one working UNet and are served one at a time.

    model: the parts, owned by this editor; between calls the working weights are the originals or one session's
    backend: of forgedit_kernels, for the merge
    """

    def __init__(self, model: Model, backend: str = "auto") -> None:
        available = available_backends(model.alphas_cumprod.device)
        if backend not in ("auto", *available):
            raise ValueError(f"backend {backend!r} cannot run here; expected one of: auto, {', '.join(available)}")
        self.model = model
        self.defaults = model.defaults
        self.backend = available[0] if backend == "auto" else backend
        self._working = {f"unet.{name}": weight for name, weight in model.unet.named_parameters()}
        self._working |= {f"text_encoder.{name}": weight for name, weight in model.text_encoder.named_parameters()}
        self._original = {name: weight.detach().clone() for name, weight in self._working.items()}
        self._changed: set[str] = set()  # names whose working weight may differ from the original
        self._loaded: tuple[weakref.ref[Session], str, float] | None = (
            None  # session, strategy and keep now in the working UNet
        )
        self._fingerprint: str | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "bundled",
        device: str = "cpu",
        backend: str = "auto",
        captioner: str | Path | None = None,
        tokenizer: str | Path | None = None,
        prediction_type: str | None = None,
    ) -> Editor:
        """Load a Stable Diffusion 1.x or 2.x, safetensors only, in float32.

        name: 'bundled'; a folder in diffusers' layout; a hub id 'owner/name', from the local cache if it is there; or a
            *.safetensors file in Stable Diffusion's original names, which needs a tokenizer
        device: a torch device string; backend: 'auto', 'reference' or 'native'
        captioner: folder or hub id of a BLIP (BlipForConditionalGeneration); None takes the model folder's captioner/
        tokenizer: folder or hub id of CLIP's tokenizer; None takes the model's own, see load_model
        prediction_type: 'epsilon' or 'v_prediction'; None takes what the model says
        Raises: ModelError for any of them, saying what would help; ValueError for the backend
        """
        return cls(load_model(name, device, captioner, tokenizer, prediction_type), backend)

    def caption(self, photo: Photo, target: str = "") -> str:
        """The captioner's words for a photo; prefixed 'A photo of ' if the target contains that (METHOD item 2).

        Raises: InputError for the photo, ModelError if the model has no captioner
        """
        image = composite_photo(open_photo(photo))
        if self.model.captioner is None:
            raise ModelError("this model has no captioner/; give the photo's caption yourself (TuneConfig.caption)")
        with self._lock:
            return caption_photo(image, self.model.captioner, self.model.processor, target)

    def tune(
        self,
        photo: Photo,
        config: TuneConfig | None = None,
        on_step: OnStep = None,
        cancel: threading.Event | None = None,
        target: str = "",
    ) -> Session:
        """Learn one photo (METHOD sections 1, 2, 6).

        photo: a path to a JPEG, PNG or WebP, or a PIL image, read as open_photo says; config: None takes defaults.tune
        on_step, cancel: see Progress
        target: the coming target if known; only decides the caption's prefix
        Raises: InputError, ModelError, TuneDiverged, Cancelled; a tune that fails leaves the original weights
        """
        config = config or self.defaults.tune
        progress = Progress(on_step, cancel)
        if config.caption is not None:
            check_prompt(config.caption, "caption")
        opened = open_photo(photo)
        image = composite_photo(opened)
        with progress.stage("caption"):
            caption = config.caption if config.caption is not None else self.caption(image, target)
        model, generator = self.model, torch.Generator().manual_seed(config.seed)
        with self._lock, self._originals_on_error():
            self._restore()
            with progress.stage("encode"):
                resized = resize_photo(image, config, model.resolution, model.vae_scale)
                encoded = encode_image(resized, model.vae, generator)
                ids = self._tokens(caption)
                embedding = encode_prompt(ids, model.text_encoder)
            with progress.stage("tune") as report:
                self._loaded, self._changed = None, set(self._working)
                learned = tune(
                    unet=model.unet,
                    text_encoder=model.text_encoder,
                    token_ids=ids,
                    embedding=embedding,
                    latents=encoded.latents,
                    alphas_cumprod=model.alphas_cumprod,
                    prediction_type=model.prediction_type,
                    config=config,
                    generator=generator,
                    on_step=report,
                )
                names = [f"unet.{name}" for name in learned.tuned_names]
                if config.profile == "dreambooth":
                    names += [name for name in self._working if name.startswith("text_encoder.")]
                tuned = {name: self._working[name].detach().clone() for name in names}
                self._restore()
        return Session(
            editor=self,
            source=encoded.image,
            caption=caption,
            config=config,
            embedding=learned.embedding,
            tuned=tuned,
            losses=learned.losses,
            stopped_early=learned.stopped_early,
            seconds=progress.seconds,
            photo_size=opened.size,
            opacity=opened.getchannel("A") if opened.mode == "RGBA" else None,
        )

    def edit(
        self,
        session: Session,
        target: str,
        config: EditConfig | None = None,
        on_step: OnStep = None,
        cancel: threading.Event | None = None,
    ) -> Edit:
        """Edit a tuned photo (METHOD sections 3 to 5); Session.edit calls this.

        Raises: InputError for a target check_target refuses; ValueError for the config or another editor's session;
            Cancelled; an edit that fails leaves the original weights
        """
        config = config or self.defaults.edit
        check_target(target)
        if session.editor is not self:
            raise ValueError("the session belongs to another editor; save it, and load it with this one's load_session")
        progress, model = Progress(on_step, cancel), self.model
        with self._lock, self._originals_on_error():
            with progress.stage("blend"):
                unconditional, embedding = self._embed(session, ""), self._embed(session, target)
                blended = blend_embeddings(session.embedding, embedding, config)
            with progress.stage("forget"):
                self._load(session, config)
            with progress.stage("sample") as report:
                width, height = session.source.size
                sampled = sample_ddim(
                    unet=model.unet,
                    embedding=blended,
                    unconditional=unconditional,
                    alphas_cumprod=model.alphas_cumprod,
                    prediction_type=model.prediction_type,
                    shape=(model.unet.config.in_channels, height // model.vae_scale, width // model.vae_scale),
                    num_steps=config.num_steps,
                    guidance_scale=config.guidance_scale,
                    generator=torch.Generator().manual_seed(config.seed),
                    on_step=report,
                )
            with progress.stage("decode"):
                image = decode_latents(sampled.latents, model.vae).image
        return Edit(
            image=image,
            latents=sampled.latents.cpu(),
            config=config,
            target=target,
            seconds=progress.seconds,
            photo_size=session.photo_size,
            opacity=session.opacity,
            cut=tokenize(target, model.tokenizer)[1],
        )

    def load_session(self, path: str | Path) -> Session:
        """Read a session saved by Session.save. Everything is checked first; no weight of the editor is touched.

        Raises: SessionError for a file that is truncated, altered, of an unknown version, or of another base model
        """
        return read_session(self, Path(path))

    def info(self) -> dict[str, Any]:
        """Model, device, backend, parameter counts, resolution in pixels, versions."""
        packages = ("torch", "diffusers", "transformers", "safetensors", "pillow")
        return {
            "model": self.model.name,
            "resolution": self.model.resolution,
            "device": str(self.model.alphas_cumprod.device),
            "backend": self.backend,
            "unet_parameters": sum(weight.numel() for weight in self.model.unet.parameters()),
            "text_encoder_parameters": sum(weight.numel() for weight in self.model.text_encoder.parameters()),
            "vae_parameters": sum(weight.numel() for weight in self.model.vae.parameters()),
            "captioner": self.model.captioner is not None,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the original UNet, text encoder and VAE; computed once, at the first save or load."""
        if self._fingerprint is None:
            vae = {f"vae.{name}": weight for name, weight in self.model.vae.state_dict().items()}
            self._fingerprint = base_fingerprint(self._original | vae)
        return self._fingerprint

    def originals(self) -> dict[str, Tensor]:
        """The original weights by name, prefixed 'unet.' or 'text_encoder.'; not to be written to."""
        return self._original

    def _tokens(self, prompt: str) -> Tensor:
        ids, cut = tokenize(prompt, self.model.tokenizer)
        if cut:
            log.warning("the prompt is longer than %d tokens; cut: %r", ids.shape[1], cut)
        return ids.to(self.model.alphas_cumprod.device)

    def _embed(self, session: Session, prompt: str) -> Tensor:
        """[1, T, D], by the session's own text encoder; each prompt is encoded once a session."""
        if prompt not in session.prompts:
            names = [name for name in session.tuned if name.startswith("text_encoder.")]
            self._changed |= set(names)
            for name in names:
                self._working[name].copy_(session.tuned[name])
            session.prompts[prompt] = encode_prompt(self._tokens(prompt), self.model.text_encoder)
            for name in names:
                self._working[name].copy_(self._original[name])
        return session.prompts[prompt]

    def _load(self, session: Session, config: EditConfig) -> None:
        """Bring the session's weights, forgotten as config says, into the working UNet; nothing if they are there."""
        key = (weakref.ref(session), config.strategy, config.keep)
        if self._loaded == key:
            return
        tuned = {name: weight for name, weight in session.tuned.items() if name.startswith("unet.")}
        self._restore(but=set(tuned))
        self._changed |= set(tuned)
        forget_weights(tuned, self._original, self._working, config.strategy, config.keep, self.backend)
        self._loaded = key

    @torch.no_grad()
    def _restore(self, but: set[str] | None = None) -> None:
        """Copy the originals back over every changed working weight, except those about to be overwritten."""
        self._loaded = None
        for name in self._changed - (but or set()):
            self._working[name].copy_(self._original[name])
            self._working[name].requires_grad_(False).grad = None
        self._changed &= but or set()

    @contextmanager
    def _originals_on_error(self) -> Iterator[None]:
        finished = False
        try:
            yield
            finished = True
        finally:
            if not finished:
                self._restore()
