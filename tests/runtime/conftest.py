"""A small random pipeline with Stable Diffusion's block names, saved as a diffusers folder; one photo; commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from forgedit import Editor
from forgedit.cli import main
from tests.runtime import naive

DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def build_pipeline(folder: Path, seed: int) -> Path:
    """Random weights: UNet of 4 down and 4 up blocks, VAE of factor 4, 77 tokens, own tokenizers; 32 pixels."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=DOWN,
        up_block_types=UP,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    characters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list(",.")
    vocabulary = characters + [character + "</w>" for character in characters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer_files = folder / "own_vocabulary"
    tokenizer_files.mkdir(parents=True)
    ids = {token: index for index, token in enumerate(vocabulary)}
    (tokenizer_files / "vocab.json").write_text(json.dumps(ids))
    (tokenizer_files / "merges.txt").write_text("\n".join(["#version: 0.2", ""]))
    (tokenizer_files / "bert.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijkl"])
    )
    tokenizer = CLIPTokenizer(str(tokenizer_files / "vocab.json"), str(tokenizer_files / "merges.txt"))
    tokenizer.model_max_length = 77
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=ids["<|startoftext|>"],
            eos_token_id=ids["<|endoftext|>"],
            pad_token_id=ids["<|endoftext|>"],
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=0,
    )
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    words = BertTokenizer(str(tokenizer_files / "bert.txt"))
    captioner = BlipForConditionalGeneration(
        BlipConfig(
            text_config=small
            | dict(
                vocab_size=17,
                encoder_hidden_size=16,
                max_position_embeddings=32,
                bos_token_id=2,
                eos_token_id=3,
                sep_token_id=3,
                pad_token_id=0,
            ),
            vision_config=small | dict(image_size=32, patch_size=8),
            projection_dim=16,
        )
    )
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), words)
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder), ("tokenizer", tokenizer)):
        part.save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    captioner.save_pretrained(folder / "captioner")
    processor.save_pretrained(folder / "captioner")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-equality is claimed on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return build_pipeline(tmp_path_factory.mktemp("pipeline"), seed=1)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory) -> Path:
    """The same shapes, other weights."""
    return build_pipeline(tmp_path_factory.mktemp("other"), seed=2)


@pytest.fixture(scope="session")
def editor(folder) -> Editor:
    return Editor.from_pretrained(folder)


@pytest.fixture(scope="session")
def reference_editor(folder) -> Editor:
    """The method's plain path, for comparisons by bits."""
    return Editor.from_pretrained(folder, numerics="reference")


@pytest.fixture(scope="session")
def pipe(folder) -> naive.Pipe:
    """The same weights, in the naive transcription's hands; no test writes to them."""
    return naive.load(folder)


@pytest.fixture(scope="session")
def photo(tmp_path_factory) -> Path:
    """60 by 30 pixels: smooth colours and noise."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 60)[None, :, None] * np.array([1.0, 0.5, 0.2]) + np.linspace(0, 50, 30)[:, None, None]
    pixels = (ramp + rng.integers(0, 6, (30, 60, 3))).clip(0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def model(folder, photo, tmp_path_factory):
    """The small random pipeline with quick settings and a demo of its own."""
    model = shutil.copytree(folder, tmp_path_factory.mktemp("cli") / "model")
    tune = {"num_steps": 2, "batch_size": 2, "unet_lr": 1e-3}
    edit = {"strategy": "encoderattn", "num_steps": 2}
    sweep = {"strategies": ["none", "encoderattn", "decoderattn"], "gammas": [0.8, 1.0, 1.2, 1.4], "num_steps": 2}
    (model / "forgedit.json").write_text(json.dumps({"tune": tune, "edit": edit, "sweep": sweep}))
    shutil.copy(photo, model / "demo.png")
    (model / "demo.json").write_text(json.dumps({"target": "a blue bird", "caption": "a red bird"}))
    return model


@pytest.fixture
def run(model, capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder; gives exit code, JSON events or text, and stderr."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*words):
        code = main([str(word) for word in (*words, "--model", model, "--threads", 1)])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()] if "--json" in words else out, err

    return run


@pytest.fixture(scope="session")
def session_file(model, photo, tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "one.session"
    assert main(["tune", str(photo), "--save", str(path), "--model", str(model), "--caption", "a cat"]) == 0
    return path
