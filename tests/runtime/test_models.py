"""What else a model may be made of: published folders' ways, another captioner or tokenizer; and what is refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from forgedit import Editor, ModelError, TuneConfig
from forgedit.model import load_model

SD14_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SD21_SCHEDULER = SD14_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
OLD_VAE_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def rewrite(part, change, name=None):
    """Give a part's weights other names, types or another file name."""
    (path,) = part.glob("*.safetensors")
    weights = change(load_file(path))
    path.unlink()
    save_file(weights, part / (name or path.name), {"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("scheduler, prediction_type", [(SD14_SCHEDULER, "epsilon"), (SD21_SCHEDULER, "v_prediction")])
def test_published_schedulers(copy, editor, capfd, scheduler, prediction_type):
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    model = load_model(copy)
    assert model.prediction_type == prediction_type
    assert torch.equal(model.alphas_cumprod, editor.model.alphas_cumprod)
    assert capfd.readouterr() == ("", "")


def test_published_names_of_older_weights(copy, editor):
    """SD 1.4's folder has its VAE's attention and its text encoder as the libraries of its time named them."""

    def old_vae(weights):
        for new, old in OLD_VAE_NAMES.items():
            weights = {name.replace(new, old): weight for name, weight in weights.items()}
        return weights

    def old_text_encoder(weights):
        renamed = {f"text_model.{name}": weight for name, weight in weights.items()}
        return renamed | {"text_model.embeddings.position_ids": torch.arange(77)[None]}

    rewrite(copy / "vae", old_vae)
    rewrite(copy / "text_encoder", old_text_encoder)
    assert Editor.from_pretrained(copy).fingerprint == editor.fingerprint


def test_a_folder_with_half_precision_alone(copy, editor):
    """What `hf download --include '*.fp16.*'` leaves."""
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        rewrite(copy / part, lambda w: {k: v.half() for k, v in w.items()}, f"{name}.fp16.safetensors")
    model = load_model(copy)
    for part in (model.unet, model.vae, model.text_encoder):
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}
    assert torch.equal(model.unet.conv_in.weight, editor.model.unet.conv_in.weight.half().float())


def test_captioner_of_ones_own(copy, other_folder, photo, editor):
    theirs = Editor.from_pretrained(other_folder)
    assert theirs.caption(photo) != editor.caption(photo)
    loaded = Editor.from_pretrained(copy, captioner=other_folder / "captioner")
    assert loaded.caption(photo) == theirs.caption(photo)
    assert loaded.fingerprint == editor.fingerprint
    shutil.rmtree(copy / "captioner")
    loaded = Editor.from_pretrained(copy, captioner=str(other_folder / "captioner"))
    assert loaded.tune(photo, TuneConfig(num_steps=1)).caption == theirs.caption(photo)


def test_captioner_is_frozen(copy, other_folder):
    captioner = load_model(copy, captioner=other_folder / "captioner").captioner
    assert not captioner.training and not any(weight.requires_grad for weight in captioner.parameters())


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "blip-2"}, "of type 'blip-2'; expected 'blip'"),
    ({"model_type": None}, "of type None; expected 'blip'"),
])  # fmt: skip
def test_another_kind_of_captioner(copy, changes, words):
    edit_json(copy / "captioner" / "config.json", **changes)
    with pytest.raises(ModelError, match=words):
        load_model(copy)


def test_incomplete_captioner(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty/config\.json cannot be read"):
        load_model(copy, captioner=tmp_path / "empty")
    with pytest.raises(ModelError, match="no captioner folder"):
        load_model(copy, captioner=tmp_path / "none")
    rewrite(copy / "captioner", lambda w: {k: v for k, v in w.items() if "vision" not in k})
    with pytest.raises(ModelError, match=r"captioner/ lacks \d+ weights"):
        load_model(copy)


def test_captioner_without_a_processor(copy):
    for path in (copy / "captioner").glob("*"):
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    with pytest.raises(ModelError, match="the captioner's processor cannot be read"):
        load_model(copy)


def test_tokenizer_of_ones_own(copy, folder, tmp_path):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = "a"
    tokenizer.save_pretrained(tmp_path / "words")
    shutil.rmtree(copy / "tokenizer")
    for given in (tmp_path / "words", str(tmp_path / "words")):
        assert load_model(copy, tokenizer=given).tokenizer.pad_token == "a"
    assert load_model(copy, tokenizer=folder).tokenizer.pad_token == "<|endoftext|>"  # found in its tokenizer/


def test_a_tokenizer_of_vocabulary_and_merges_alone(copy, folder, editor, tmp_path):
    (tmp_path / "words").mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / "own_vocabulary" / name, tmp_path / "words")
    tokenizer = load_model(copy, tokenizer=tmp_path / "words").tokenizer
    assert tokenizer.model_max_length == 77
    for prompt in ("a cat, by a wall", ""):
        ids = [
            each(prompt, padding="max_length", max_length=77).input_ids for each in (tokenizer, editor.model.tokenizer)
        ]
        assert ids[0] == ids[1]


def test_no_tokenizer_is_made_up(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no tokenizer in .*; expected vocab\.json and merges\.txt"):
        load_model(copy, tokenizer=tmp_path / "empty")


def test_a_tokenizer_of_more_tokens_than_the_text_encoder_knows(copy, folder, tmp_path):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<sks>"])
    tokenizer.save_pretrained(tmp_path / "words")
    with pytest.raises(ModelError, match="the tokenizer has 59 tokens, the text encoder knows 58"):
        load_model(copy, tokenizer=tmp_path / "words")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "captioner"])
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_pickled_part(copy, editor, part, suffix):
    """It is refused, and the command the error gives makes a folder that loads."""
    (weights,) = (copy / part).glob("*.safetensors")
    stem = "pytorch_model" if part in ("text_encoder", "captioner") else "diffusion_pytorch_model"
    torch.save(load_file(weights), copy / part / (stem + suffix))
    weights.unlink()
    with pytest.raises(
        ModelError, match=f"{part}/ holds only pickled weights .*can run code and are refused"
    ) as refused:
        load_model(copy)
    if suffix == ".bin":  # the one the libraries look for
        exec(re.search(r'python -c "(.*)"', str(refused.value))[1], {})
        assert Editor.from_pretrained(copy).fingerprint == editor.fingerprint


@pytest.mark.parametrize("keyword", ["captioner", "tokenizer"])
def test_pickled_file_for_a_part(copy, tmp_path, keyword):
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled"):
        load_model(copy, **{keyword: tmp_path / "a.pt"})
    (tmp_path / "a.json").write_bytes(b"")
    with pytest.raises(ModelError, match=f"the {keyword} .*is a file; expected a folder"):
        load_model(copy, **{keyword: tmp_path / "a.json"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0, 100, -8])
def test_weights_cut_short(copy, part, keep):
    (path,) = (copy / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=f"{part}/ cannot be read"):
        load_model(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_configuration(copy, part, content):
    path = copy / part / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ModelError, match=rf"{part}/config\.json (cannot be read|holds no JSON object)"):
        load_model(copy)


@pytest.mark.parametrize("part, changes, words", [
    ("unet", {"in_channels": 9}, "unet/ cannot be read"),
    ("unet", {"class_embed_type": "identity"}, "wants more than a prompt: .*'class_embed_type': 'identity'"),
    ("text_encoder", {"hidden_size": 16}, "text_encoder/ cannot be read"),
])  # fmt: skip
def test_other_shapes(copy, part, changes, words):
    edit_json(copy / part / "config.json", **changes)
    with pytest.raises(ModelError, match=words):
        load_model(copy)


def test_parts_of_different_models(copy):
    edit_json(copy / "unet" / "config.json", cross_attention_dim=24)
    rewrite(copy / "unet", lambda w: {k: v[:, :24].contiguous() if ".attn2.to_k." in k or ".attn2.to_v." in k else v
                                      for k, v in w.items()})  # fmt: skip
    with pytest.raises(ModelError, match="attends to embeddings of width 24, the text encoder gives 32"):
        load_model(copy)


def test_inpainting_is_refused(copy):
    edit_json(copy / "unet" / "config.json", in_channels=9)
    rewrite(copy / "unet", lambda w: w | {"conv_in.weight": torch.zeros(16, 9, 3, 3)})
    with pytest.raises(ModelError, match=r"takes 9 channels and gives 4, the VAE's latents have 4.*inpainting"):
        load_model(copy)
