"""Experimental: a short sequence of frames of one scene, edited with one session and one noise.

The method begins an edit from noise alone, so that nothing of a frame would be in it. Here a frame comes in as into
SDEdit: its latents are noised to a level of the schedule, and denoised from there on by the session's weights under the
edit embedding, forgotten and blended as in an edit. Frames that are alike begin alike, as they share the noise.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from forgedit.config import EditConfig
from forgedit.engine.batch import Leg
from forgedit.engine.sampler import ddim_schedule, last_steps
from forgedit.errors import InputError
from forgedit.progress import OnStep
from forgedit.session import Session
from forgedit.stages.encode import check_target, resize_photo
from forgedit.stages.photo import Photo, composite_photo, open_photo, restore_size


@dataclass(frozen=True)
class EditedFrames:
    """A sequence's edits, in the frames' order.

    images: RGB, of the session's edited size; latents: [F, C, h, w] float32, scaled as the UNet sees them
    frame_size: width and height of the frames given, pixels
    seconds: by stage ('forget', 'sample', 'decode')
    """

    images: tuple[Image.Image, ...]
    latents: torch.Tensor
    frame_size: tuple[int, int]
    seconds: dict[str, float]

    def at_frame_size(self) -> list[Image.Image]:
        """The pictures at the frames' own size, by Lanczos, RGB."""
        return [restore_size(image, self.frame_size, None) for image in self.images]


def edit_frames(
    session: Session,
    frames: Sequence[Photo],
    target: str,
    config: EditConfig | None = None,
    strength: float = 0.75,
    on_step: OnStep = None,
    cancel: threading.Event | None = None,
) -> EditedFrames:
    """Edit frames of one scene towards one target.

    session: best of all the frames, learned together (Editor.tune's others): one that learned the first alone has
        learned where things stand in it, too, and draws them there in the other frames
    frames: as tune takes photos, all of the size of the session's photo; transparent ones are put over white
    config: None takes the editor's defaults.edit. Its scheduler must be 'ddim'; the noise of its seed is every frame's
    strength: share of the denoising steps that is done, in (0, 1]; less keeps more of each frame, 1 begins from noise
        alone, so that all frames would be one picture
    on_step, cancel: as in Editor.edit, over the steps of all frames; as many go together as edits do
    Raises: InputError for the target, for no frame, or one that cannot be read or has another size; ValueError for the
        strength, a scheduler that is not 'ddim', or the strategy; EditDiverged; Cancelled; RuntimeError from inside
        on_step
    Source: Meng et al. 2021, arXiv 2108.01073, section 3; one noise for all frames as in Khachatryan et al. 2023, arXiv
        2303.13439, without its motion
    """
    editor = session.editor
    config, model = config or editor.defaults.edit, editor.model
    check_target(target)
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength!r} is out of range; expected a number in (0, 1]")
    if config.scheduler != "ddim":
        raise ValueError(f"scheduler {config.scheduler!r} cannot begin part of the way; frames take 'ddim' alone")
    opened = open_frames(frames, session.photo_size or session.source.size)
    pictures = [resize_photo(frame, session.config, model.resolution, model.vae_scale) for frame in opened]
    latents = editor.encode(session, pictures)
    whole = ddim_schedule(model.alphas_cumprod, config.num_steps, model.prediction_type)
    schedule = last_steps(whole, max(round(strength * config.num_steps), 1))
    noise = torch.randn(latents[:1].shape, generator=torch.Generator().manual_seed(config.seed)).to(latents)
    signal = model.alphas_cumprod[schedule.timesteps[0]]
    start = signal**0.5 * latents + (1 - signal) ** 0.5 * noise
    if len(schedule.timesteps) == config.num_steps:
        start = noise.expand_as(latents)  # as an edit begins: the first timestep's level has a little of the frame left
    legs = [Leg(schedule, target, config.guidance_scale, blend=config)]
    made = editor.travel(session, start, legs, config.strategy, config.keep, on_step, cancel)
    return EditedFrames(made.images, made.latents, opened[0].size, made.seconds)


def open_frames(frames: Sequence[Photo], size: tuple[int, int]) -> list[Image.Image]:
    """Frames upright, RGB. size: width and height that each has to have, pixels. Raises: InputError"""
    if not frames:
        raise InputError("there is no frame to edit; give at least one")
    opened = [composite_photo(open_photo(frame, f"frame {place}")) for place, frame in enumerate(frames, 1)]
    for place, frame in enumerate(opened, 1):
        if frame.size != size:
            raise InputError(
                f"frame {place} has {frame.width} by {frame.height} pixels, the photo that was learned {size[0]} by "
                f"{size[1]}; expected frames of its size"
            )
    return opened
