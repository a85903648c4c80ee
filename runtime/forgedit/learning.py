"""A photo, or several of one subject, on the way to what is learned of them: opened, brought to one size, encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageOps
from torch import Tensor

from forgedit.config import TuneConfig
from forgedit.engine.reference import Reference
from forgedit.engine.resident import Resident
from forgedit.engine.tune_inputs import Learned, TuneInputs
from forgedit.errors import InputError, TuneDiverged
from forgedit.progress import Progress
from forgedit.prompts import Prompts
from forgedit.session import Session
from forgedit.stages.encode import encode_image, encode_prompt, resize_photo
from forgedit.stages.photo import Photo, composite_photo, open_photo
from forgedit.stages.tune import first_embedding, trainable_names

if TYPE_CHECKING:
    from forgedit.editor import Editor


@dataclass(frozen=True)
class Subject:
    """photo: the first, upright, RGB, or RGBA where it is transparent; images: all photos, RGB, over white."""

    photo: Image.Image
    images: tuple[Image.Image, ...]


def open_subject(photos: Iterable[Photo]) -> Subject:
    """Open photos as open_photo says. Raises: InputError for one of them, or if there is none"""
    opened = [open_photo(photo) for photo in photos]
    if not opened:
        raise InputError("there is no photo to learn; give at least one")
    return Subject(opened[0], tuple(composite_photo(photo) for photo in opened))


def to_one_size(
    images: Sequence[Image.Image], config: TuneConfig, resolution: int, vae_scale: int
) -> list[Image.Image]:
    """Each image as resize_photo gives it; where that is not the first one's size, scaled to cover that size, and what
    reaches beyond it cut off evenly on both sides.

    config, resolution, vae_scale: as resize_photo takes them
    """
    resized = [resize_photo(image, config, resolution, vae_scale) for image in images]
    size = resized[0].size
    return [
        fitting if fitting.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        for image, fitting in zip(images, resized, strict=True)
    ]


def trained_names(weights: Iterable[str], config: TuneConfig) -> list[str]:
    """Of the names of weights, prefixed 'unet.' or 'text_encoder.', those that are trained, by profile and rates.

    Raises: ValueError for a profile that trains nothing of this UNet
    """
    weights = list(weights)
    unet = trainable_names([name.removeprefix("unet.") for name in weights if name.startswith("unet.")], config.profile)
    text = [name for name in weights if name.startswith("text_encoder.")] if config.profile == "dreambooth" else []
    chosen = [f"unet.{name}" for name in unet] if config.unet_lr else []
    return chosen + (text if config.text_encoder_lr else [])


def learn_subject(
    editor: Editor,
    subject: Subject,
    caption: str,
    given: Tensor | None,
    names: Sequence[str],
    config: TuneConfig,
    prompts: Prompts,
    path: Callable[[], Reference | Resident],
    restore: Callable[[], None],
    progress: Progress,
) -> Session:
    """Encode and learn, in stages 'encode' and 'tune'; where all rates are 0 nothing is learned, at once.

    editor: whose turn it is, and whose session it will be
    given: where the source embedding starts, see first_embedding; names: of the weights to train
    path: gives what learns; restore: brings the original weights back, which the caption is encoded with
    Raises: TuneDiverged; ValueError for the embedding given, or more photos than samples; what the path raises
    """
    model, generator = editor.model, torch.Generator().manual_seed(config.seed)
    with progress.stage("encode"):
        images = to_one_size(subject.images, config, model.resolution, model.vae_scale)
        vae = path().encoder(*images[0].size, config.memory_bytes)
        latents = torch.cat([encode_image(image, vae, generator).latents for image in images])
        ids, _ = prompts.tokens(caption)
        restore()
        start = first_embedding(encode_prompt(ids, model.text_encoder), given, config)
    with progress.stage("tune") as report:
        inputs = TuneInputs(
            latents=latents,
            embedding=start,
            token_ids=ids,
            alphas_cumprod=model.alphas_cumprod,
            prediction_type=model.prediction_type,
            names=names,
            config=config,
            generator=generator,
            on_step=report,
        )
        nothing = not names and not config.embedding_lr
        learned = Learned(start, {}, (), False, "nothing was learned") if nothing else path().learn(inputs)
        if not all(weight.isfinite().all() for weight in (learned.embedding, *learned.tuned.values())):
            raise TuneDiverged("the last step left values that are not finite; lower unet_lr or loss_scale")
    photo = subject.photo
    return Session(
        editor=editor,
        source=images[0],
        caption=caption,
        config=config,
        embedding=learned.embedding,
        tuned=learned.tuned,
        losses=learned.losses,
        stopped_early=learned.stopped_early,
        way=learned.way,
        seconds=progress.seconds,
        num_photos=len(images),
        photo_size=photo.size,
        opacity=photo.getchannel("A") if photo.mode == "RGBA" else None,
    )
