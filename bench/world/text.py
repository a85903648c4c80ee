"""The bundled model's words: a CLIPTokenizer with a vocabulary of our own, and a small CLIPTextModel.

The vocabulary is the 256 byte symbols, each also as a word's end, and a chain of merges for each word of the world's
captions, so that every caption word is one token and any other text still has tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from forgedit.world.scene import all_combinations, caption

MAX_LENGTH = 77
PREFIXES = ("a photo of ", "")
END = "</w>"


def _byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes used by byte-level BPE (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def words() -> list[str]:
    """Every word of every caption, sorted."""
    text = " ".join([*PREFIXES, *(caption(c) for c in all_combinations())])
    return sorted(set(text.split()))


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt and load them back.

    Raises: ValueError if a caption word would not be one token
    """
    merges: list[tuple[str, str]] = []
    for word in words():
        symbols = [*word[:-1], word[-1] + END]
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
            symbols[:2] = ["".join(pair)]
    base = _byte_symbols()
    tokens = [*base, *(s + END for s in base), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_LENGTH)
    split = [word for word in words() if len(tokenizer(word).input_ids) != 3]
    if split:
        raise ValueError(f"words of several tokens: {split}; expected one token each (reorder the merges)")
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokens_of(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, int64 [B, 77], padded."""
    output = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return output.input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def encode(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Last hidden state, [B, 77, 128]."""
    return text_encoder(ids).last_hidden_state
