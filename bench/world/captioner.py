"""The bundled captioner: a small BLIP that describes renders in the world's own words, and the reader of such captions.

BlipForConditionalGeneration with a word-level BertTokenizer and a BlipProcessor at 64 pixels, saved in the layout that
`from_pretrained` reads offline. The default `generate` starts from [CLS] (the text config's bos) and ends at [SEP].
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from bench.world import pool
from bench.world.judge import augment
from bench.world.loop import Loss, Plan
from forgedit.world.judge import POSED
from forgedit.world.scene import (
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    PATTERNS,
    PLACES,
    POSES,
    all_combinations,
    caption,
    captions,
)

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_TOKENS = 24
SIZE = 64
WIDTH = 112
SHAPE_WEIGHT = 6.0  # of the words for object and pose in the loss: shapes are what a small ViT learns last
POSED_ODDS = 2.5  # how much more often a scene whose object has a pose is drawn


def vocabulary() -> dict[str, int]:
    """Special tokens, then every word of every caption, sorted."""
    words = {word for combination in all_combinations() for word in caption(combination).split()}
    return {word: i for i, word in enumerate((*SPECIALS, *sorted(words | {"a", "photo", "of"})))}


def build_processor() -> BlipProcessor:
    size = {"height": SIZE, "width": SIZE}
    return BlipProcessor(BlipImageProcessorPil(size=size), BertTokenizer(vocabulary(), model_max_length=MAX_TOKENS))


def build_captioner() -> BlipForConditionalGeneration:
    """1.06 M parameters: a vision transformer of 4 layers on 8-pixel patches, a text decoder of 2."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "projection_dim": WIDTH, "num_attention_heads": 4}
    vision = {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8, "initializer_range": 0.02}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    text = {"num_hidden_layers": 2, "vocab_size": len(vocabulary()), "max_position_embeddings": MAX_TOKENS}
    joint = {"projection_dim": WIDTH, "image_text_hidden_size": WIDTH}
    return BlipForConditionalGeneration(
        BlipConfig(vision_config=vision | shared, text_config=text | ids | shared, **joint)
    )


def word_weights() -> Tensor:
    """Weight of each word of the vocabulary in the loss, float32 [V]; padding has none."""
    poses = [pose for choices in POSES.values() for pose in choices]
    shapes = {word for phrase in (*OBJECTS, *poses) for word in phrase.split()}
    return torch.tensor([SHAPE_WEIGHT if word in shapes else float(i != 0) for word, i in vocabulary().items()])


def normalised(pixels: Tensor) -> Tensor:
    """Pixels [-1, 1] to what the processor makes of a picture of the model's size."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


def _loss(
    captioner: BlipForConditionalGeneration,
    data: pool.Pool,
    tokens: Tensor,
    device: str,
    n: int,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    odds = torch.where(POSED[data.scenes.object], POSED_ODDS, 1.0)
    index = torch.multinomial(odds, n, replacement=True, generator=generator)
    pixels = normalised(augment(data.batch(index)[0], generator)).to(device)
    words = tokens[index].to(device)
    labels = words.masked_fill(words == 0, -100)
    logits = captioner(pixel_values=pixels, input_ids=words, attention_mask=(words != 0).long()).logits[:, :-1]
    truth = labels[:, 1:]
    right = ((logits.argmax(-1) == truth) | (truth == -100)).all(1).float().mean()
    loss = F.cross_entropy(logits.transpose(1, 2), truth, word_weights().to(device))
    return loss, {"whole": float(right)}


def build(plan: Plan, data: Path) -> tuple[nn.Module, Loss]:
    """For loop.launch."""
    scenes, tokenizer = pool.load(data), build_processor().tokenizer
    encoded = tokenizer(captions(scenes.scenes), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    tokens = encoded.input_ids[:, : int(encoded.attention_mask.sum(1).max())]
    torch.manual_seed(plan.seed)
    captioner = build_captioner()
    return captioner, partial(_loss, captioner, scenes, tokens, plan.device)


def save_captioner(captioner: BlipForConditionalGeneration, folder: Path) -> None:
    """Weights in float16 safetensors, tokenizer and processor: what `from_pretrained(folder)` reads. Casts in place."""
    captioner.half().save_pretrained(folder)
    build_processor().save_pretrained(folder)


def export(checkpoint: Path, folder: Path) -> None:
    """Save the averaged weights of a training checkpoint."""
    captioner = build_captioner()
    captioner.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"])
    save_captioner(captioner, folder)


def load_captioner(folder: Path) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """In float32, as the runtime loads it."""
    captioner = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return captioner.eval(), BlipProcessor.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def describe(captioner: Any, processor: Any, pictures: list[Image.Image], batch: int = 50) -> list[str]:
    """Captions of RGB pictures, by the default `generate`."""
    words: list[str] = []
    for start in range(0, len(pictures), batch):
        inputs = processor(images=pictures[start : start + batch], return_tensors="pt")
        words += processor.batch_decode(captioner.generate(**inputs), skip_special_tokens=True)
    return words


def parse_caption(text: str) -> dict[str, int | None]:
    """Read a caption of the world back into attribute indices; None where it names none.

    A thing without poses has pose 0, and no pattern word means plain, as `caption` writes them.
    """
    words = text.lower().split()

    def first(names: tuple[str, ...]) -> int | None:
        return next((i for i, name in enumerate(names) if name in words), None)

    thing, pose = first(OBJECTS), None
    if thing is not None:
        choices = POSES.get(OBJECTS[thing], ("",))
        pose = next((i for i, choice in enumerate(choices) if choice in text.lower()), None)
    ground = next((i for i, name in enumerate(BACKGROUNDS) if PLACES[name] in text.lower()), None)
    pattern = first(PATTERNS[1:])
    return {
        "object": thing,
        "pose": pose,
        "colour": first(COLOURS),
        "pattern": 0 if pattern is None else pattern + 1,
        "background": ground,
    }
