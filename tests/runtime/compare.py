"""How far the engine is from the naive transcription: one number per quantity, 0 where the bits agree."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from forgedit import Editor, Session, TuneConfig
from forgedit.stages.encode import encode_image, resize_photo
from forgedit.stages.photo import open_photo
from tests.runtime.naive import FROZEN, METHOD, Learned, Pipe, Rules, learn, prepare_image

TOLERANCE = 1e-6  # relative; what differs by more is another method

# METHOD's shape of a run, small enough for a test; rates large enough that every rule leaves a trace
TUNE = dict(
    num_steps=6, batch_size=3, unet_lr=1e-3, embedding_lr=1e-2, min_samples=9, seed=5, caption="a cat, by a wall"
)

PROFILES: dict[str, tuple[TuneConfig, Rules]] = {
    "official": (TuneConfig(profile="official", **TUNE), METHOD),
    "paper": (TuneConfig(profile="paper", **TUNE), replace(METHOD, frozen=FROZEN["paper"], loss_scale=1.0)),
    "dreambooth": (
        TuneConfig(profile="dreambooth", **TUNE | dict(embedding_lr=0.0, text_encoder_lr=1e-3)),
        replace(METHOD, blocks=(), train_text_encoder=True, reencode=True),
    ),
}


def difference(ours: torch.Tensor, naive: torch.Tensor) -> float:
    """Largest difference relative to the largest naive magnitude; inf if shapes differ or a value is not finite."""
    ours, naive = ours.detach(), naive.detach()
    if ours.shape != naive.shape or not (torch.isfinite(ours).all() and torch.isfinite(naive).all()):
        return float("inf")
    return float((ours - naive).abs().max() / naive.abs().max().clamp_min(1e-30))


@dataclass(frozen=True)
class Differences:
    z: float
    losses: float
    e_src: float
    weights: float  # of the tuned weights' deltas, worst tensor

    def worst(self) -> float:
        return max(self.z, self.losses, self.e_src, self.weights)


def tuned_differences(session: Session, z: torch.Tensor, original: Pipe, learned: Learned) -> Differences:
    """Compare a session, and the latents z it was learned from, with the naive one; untrained tensors must be equal."""
    parts = (
        ("unet", original.unet, learned.pipe.unet),
        ("text_encoder", original.text_encoder, learned.pipe.text_encoder),
    )
    worst = 0.0
    for prefix, before, after in parts:
        naive_weights = dict(after.named_parameters())
        for name, start in before.named_parameters():
            ours = session.tuned.get(f"{prefix}.{name}", start)
            delta, naive_delta = (ours - start).detach(), (naive_weights[name] - start).detach()
            worst = max(worst, difference(delta, naive_delta))
    return Differences(
        z=difference(z, learned.z),
        losses=difference(torch.tensor(session.losses), torch.tensor(learned.losses)),
        e_src=difference(session.embedding, learned.e_src),
        weights=worst,
    )


def engine_latents(editor: Editor, photo: Path, config: TuneConfig) -> tuple[Image.Image, torch.Tensor]:
    """The picture the engine learns, and its latents z as drawn from the tuning seed."""
    image = resize_photo(open_photo(photo), config, editor.model.resolution, editor.model.vae_scale)
    generator = torch.Generator().manual_seed(config.seed)
    return image, encode_image(image, editor.model.vae, generator).latents


def learn_naively(pipe: Pipe, photo: Path, config: TuneConfig, rules: Rules) -> Learned:
    assert config.caption is not None
    return learn(
        pipe,
        prepare_image(photo, 32, rules),
        config.caption,
        rules,
        steps=config.num_steps,
        batch=config.batch_size,
        unet_lr=config.unet_lr,
        embedding_lr=config.embedding_lr,
        seed=config.seed,
        threshold=config.loss_threshold,
        min_samples=config.min_samples,
    )
