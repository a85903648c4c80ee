"""Other editing methods on the same model: what Forgedit is held against.

A baseline is two choices: what is learned from the photo, which gives a session, and how a picture is made on that
session's weights. Either half goes with the other's, and whatever was learned can be forgotten by the same strategies:
so that one can ask whether forgetting helps other methods too.

All run on the editor's own engine. Nothing here belongs to one model but the rates of Imagic and DreamBooth.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from forgedit.config import PROFILES, EditConfig, TuneConfig
from forgedit.editor import Editor
from forgedit.engine.batch import Leg
from forgedit.engine.sampler import ddim_schedule, inverted, last_steps
from forgedit.session import Session
from forgedit.stages.encode import check_target, encode_image
from forgedit.stages.photo import Photo


class Learning(Protocol):
    """What is learned from one photo."""

    def learn(self, editor: Editor, photo: Photo, caption: str, target: str) -> Session:
        """The photo's session; its seconds and losses are of all that was done. Raises: as Editor.tune does"""
        ...


@dataclass(frozen=True)
class Untuned:
    """Nothing: the original weights, and the caption's own embedding."""

    def learn(self, editor: Editor, photo: Photo, caption: str, target: str) -> Session:
        config = editor.defaults.tune.replace(profile="official", unet_lr=0.0, embedding_lr=0.0, caption=caption)
        return editor.tune(photo, config)


@dataclass(frozen=True)
class Tuned:
    """UNet and source embedding together, as Forgedit learns. changes: to the model's own TuneConfig, by field"""

    changes: Mapping[str, Any] = field(default_factory=dict)

    def learn(self, editor: Editor, photo: Photo, caption: str, target: str) -> Session:
        return editor.tune(photo, editor.defaults.tune.replace(**{"caption": caption, **self.changes}))


@dataclass(frozen=True)
class DreamBooth:
    """The whole UNet and the text encoder, at low rates under the caption (METHOD section 6).

    stronger: than the method's rates for Stable Diffusion; None for four times as much as the model's own tuning rate
        is, which served the bundled model best (docs/findings.md)
    Source: Ruiz et al. 2022, arXiv 2208.12242; without its prior-preservation loss, as Forgedit's authors run it
    """

    stronger: float | None = None

    def learn(self, editor: Editor, photo: Photo, caption: str, target: str) -> Session:
        stronger = 4 * _how_strong(editor) if self.stronger is None else self.stronger
        preset = PROFILES["dreambooth"]
        rates = {name: preset[name] * stronger for name in ("unet_lr", "text_encoder_lr")}
        return editor.tune(photo, editor.defaults.tune.replace(profile="dreambooth", caption=caption, **rates))


@dataclass(frozen=True)
class Imagic:
    """First the target's embedding, moved towards the photo on the original UNet; then the whole UNet under it.

    embedding_steps, unet_steps: of batch_size samples each; the paper's 1000 and 1500 steps on Stable Diffusion, cut to
        what Forgedit's own tune costs
    embedding_lr: the paper's 2e-3 times 20, as a thousand of its steps are 40 here (docs/findings.md)
    unet_lr: None for the model's own tuning rate, as few steps need more than the paper's 5e-7
    Source: Kawar et al. 2022, arXiv 2210.09276, section 3.2
    """

    embedding_steps: int = 40
    unet_steps: int = 40
    batch_size: int = 10
    embedding_lr: float = 4e-2
    unet_lr: float | None = None

    def learn(self, editor: Editor, photo: Photo, caption: str, target: str) -> Session:
        """Its source embedding is the optimised one; the photo's caption is not used."""
        common: dict[str, Any] = dict(batch_size=self.batch_size, loss_threshold=0.0, caption=target)
        own = editor.defaults.tune
        first = own.replace(
            profile="official", num_steps=self.embedding_steps, unet_lr=0.0, embedding_lr=self.embedding_lr, **common
        )
        second = own.replace(
            profile="dreambooth",
            num_steps=self.unet_steps,
            unet_lr=own.unet_lr if self.unet_lr is None else self.unet_lr,
            text_encoder_lr=0.0,
            **common,
        )
        moved = editor.tune(photo, first)
        session = editor.tune(photo, second, embedding=moved.embedding)
        seconds = {stage: spent + moved.seconds[stage] for stage, spent in session.seconds.items()}
        return replace(session, losses=moved.losses + session.losses, seconds=seconds)


@dataclass(frozen=True)
class Made:
    """image: RGB at the session's edited size; seconds: from the session to it."""

    image: Image.Image
    seconds: float


class Making(Protocol):
    """How a picture is made from a session."""

    def make(self, session: Session, target: str, config: EditConfig) -> Image.Image:
        """An RGB picture at the session's edited size.

        config: whose strategy, keep, num_steps, guidance_scale and seed are read
        Raises: as Editor.edit does
        """
        ...


@dataclass(frozen=True)
class Unchanged:
    """The photo itself: keeps everything, changes nothing."""

    def make(self, session: Session, target: str, config: EditConfig) -> Image.Image:
        return session.source.copy()


@dataclass(frozen=True)
class FromNoise:
    """From noise alone, under gamma of the target's embedding and the rest of the session's.

    On an untuned session gamma 1 is plain text-to-image; on Imagic's, gamma is its eta; on Forgedit's, it is Forgedit.
    """

    gamma: float = 1.0

    def make(self, session: Session, target: str, config: EditConfig) -> Image.Image:
        return session.edit(target, replace(config, scheduler="ddim", blend="vs", gamma=self.gamma)).image


@dataclass(frozen=True)
class SDEdit:
    """The photo's latents under some noise, denoised under the target.

    strength: share of the denoising steps that is done, in (0, 1]; 1 starts from noise alone
    Source: Meng et al. 2021, arXiv 2108.01073, section 3
    Raises: ValueError for the strength
    """

    strength: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength {self.strength!r} is out of range; expected a number in (0, 1]")

    def make(self, session: Session, target: str, config: EditConfig) -> Image.Image:
        check_target(target)
        model, latents = session.editor.model, photo_latents(session)
        whole = ddim_schedule(model.alphas_cumprod, config.num_steps, model.prediction_type)
        steps = max(round(self.strength * config.num_steps), 1)
        schedule = last_steps(whole, steps)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(config.seed)).to(latents)
        signal = model.alphas_cumprod[schedule.timesteps[0]]
        start = noise if steps == config.num_steps else signal**0.5 * latents + (1 - signal) ** 0.5 * noise
        legs = [Leg(schedule, target, config.guidance_scale)]
        return session.editor.travel(session, start, legs, config.strategy, config.keep).image


@dataclass(frozen=True)
class Inversion:
    """The photo's latents taken back to noise under the session's embedding, then denoised under the target.

    No noise is drawn: the seed does not matter.
    Source: Song et al. 2020, arXiv 2010.02502, section 4.3; the swap of prompts as the baseline of Hertz et al. 2022,
    arXiv 2208.01626
    """

    def make(self, session: Session, target: str, config: EditConfig) -> Image.Image:
        check_target(target)
        model = session.editor.model
        schedule = ddim_schedule(model.alphas_cumprod, config.num_steps, model.prediction_type)
        legs = [Leg(inverted(schedule), None, 1.0), Leg(schedule, target, config.guidance_scale)]
        return session.editor.travel(session, photo_latents(session), legs, config.strategy, config.keep).image


@dataclass(frozen=True)
class Baseline:
    """A learning and a making."""

    learning: Learning
    making: Making

    def learn(self, editor: Editor, photo: Photo, caption: str, target: str) -> Session:
        """The photo's session. caption: what the photo shows; target: what the edited photo should show"""
        return self.learning.learn(editor, photo, caption, target)

    def make(self, session: Session, target: str, config: EditConfig) -> Made:
        """A picture of a session that learn gave; config as Making.make reads it."""
        start = time.perf_counter()
        image = self.making.make(session, target, config)
        return Made(image, time.perf_counter() - start)


# Forgedit itself among them. The strengths of SDEdit, Imagic and DreamBooth are those that came nearest to the rendered
# world's true edits with the bundled model (docs/findings.md); inversion has none.
BASELINES: dict[str, Baseline] = {
    "photo unchanged": Baseline(Untuned(), Unchanged()),
    "text-to-image": Baseline(Untuned(), FromNoise()),
    "SDEdit": Baseline(Untuned(), SDEdit()),
    "SDEdit, tuned": Baseline(Tuned(), SDEdit(0.9)),
    "DDIM inversion": Baseline(Untuned(), Inversion()),
    "DDIM inversion, tuned": Baseline(Tuned(), Inversion()),
    "Imagic": Baseline(Imagic(), FromNoise(1.2)),
    "DreamBooth": Baseline(DreamBooth(), FromNoise()),
    "Forgedit": Baseline(Tuned(), FromNoise()),
}


def photo_latents(session: Session) -> Tensor:
    """The latents [1, C, h, w] that the session learned, or would have: drawn once more with its seed."""
    generator = torch.Generator().manual_seed(session.config.seed)
    return encode_image(session.source, session.editor.model.vae, generator).latents


def _how_strong(editor: Editor) -> float:
    """The model's own tuning rate in units of the method's for Stable Diffusion."""
    return float(editor.defaults.tune.unet_lr / TuneConfig().unet_lr)
