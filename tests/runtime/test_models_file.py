"""Single files in Stable Diffusion's original names: small random models written so, and read back."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from forgedit import EditConfig, Editor, ModelError, TuneConfig
from forgedit.cli import main
from forgedit.model import load_model, single_file
from tests.runtime import ldm

TUNE = TuneConfig(caption="a cat", num_steps=2, batch_size=2, unet_lr=1e-3)
EDIT = EditConfig(num_steps=3, strategy="encoderattn")
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def parts(folder):
    """generation -> its small modules: the test pipeline's own, and the same with what 2.x does otherwise."""
    first = (
        UNet2DConditionModel.from_pretrained(folder / "unet"),
        AutoencoderKL.from_pretrained(folder / "vae"),
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
    )
    torch.manual_seed(3)
    unet = {**first[0].config, "use_linear_projection": True, "attention_head_dim": (1, 2, 2, 2)}
    text_encoder = {**first[2].config.to_dict(), "hidden_act": "gelu", "num_hidden_layers": 3}
    return {
        1: first,
        2: (UNet2DConditionModel.from_config(unet), first[1], CLIPTextModel(CLIPTextConfig(**text_encoder))),
    }


@pytest.fixture
def small(parts, monkeypatch):
    """The architectures at the small modules' size; all else as in the published ones."""
    known = []
    for generation, architecture in enumerate(single_file.ARCHITECTURES, 1):
        configs = [{k: v for k, v in module.config.items() if k[0] != "_"} for module in parts[generation][:2]]
        text_encoder = parts[generation][2].config.to_dict()
        known.append(replace(architecture, unet=configs[0], vae=configs[1], text_encoder=text_encoder))
    monkeypatch.setattr(single_file, "ARCHITECTURES", tuple(known))


@pytest.fixture(scope="module")
def files(parts, tmp_path_factory):
    """generation -> its checkpoint file."""
    folder = tmp_path_factory.mktemp("files")
    paths = {generation: folder / f"v{generation}.safetensors" for generation in parts}
    for generation, path in paths.items():
        save_file(ldm.checkpoint(*parts[generation], generation=generation), path)
    return paths


def changed(path, target, change, metadata=None):
    tensors = load_file(path)
    save_file({name: weight.contiguous() for name, weight in change(tensors).items()}, target, metadata)
    return target


@pytest.mark.parametrize("generation", [1, 2])
def test_weights_are_those_of_the_parts(small, files, parts, folder, generation, capfd):
    model = load_model(files[generation], tokenizer=folder, prediction_type="epsilon")
    assert capfd.readouterr() == ("", "")
    for name, expected in zip(PARTS, parts[generation], strict=True):
        ours, theirs = getattr(model, name).state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].is_contiguous() for key in theirs)
        assert not any(weight.requires_grad or weight.is_meta for weight in getattr(model, name).parameters())
    ids = torch.arange(3)[None]
    assert torch.equal(model.text_encoder(ids)[0], parts[generation][2](ids)[0])  # buffers too


def test_edits_as_the_folder_does(small, files, folder, editor, photo):
    loaded = Editor.from_pretrained(str(files[1]), tokenizer=folder / "tokenizer", captioner=folder / "captioner")
    assert loaded.fingerprint == editor.fingerprint
    assert loaded.caption(photo) == editor.caption(photo)
    config = TUNE.replace(width=32, height=32)  # a single file is taken to want Stable Diffusion's own 512 pixels
    edits = [each.tune(photo, config).edit("a dog", EDIT) for each in (loaded, editor)]
    assert torch.equal(edits[0].latents, edits[1].latents)


@pytest.mark.parametrize("generation, given, declared, expected", [
    (1, None, None, ("epsilon", 512)),
    (1, "v_prediction", None, ("v_prediction", 512)),
    (2, "v_prediction", None, ("v_prediction", 768)),
    (2, "epsilon", None, ("epsilon", 512)),
    (2, None, "v", ("v_prediction", 768)),
    (2, None, "epsilon", ("epsilon", 512)),
    (2, "epsilon", "v", ("epsilon", 512)),
])  # fmt: skip
def test_prediction_type(small, files, folder, tmp_path, generation, given, declared, expected):
    metadata = {"modelspec.prediction_type": declared} if declared else None
    path = changed(files[generation], tmp_path / "a.safetensors", dict, metadata)
    model = load_model(path, tokenizer=folder, prediction_type=given)
    assert (model.prediction_type, model.resolution) == expected
    assert model.alphas_cumprod.shape == (1000,) and 0.0046 < model.alphas_cumprod[-1] < 0.0047


def test_a_second_generation_that_does_not_say_what_it_predicts(small, files, folder):
    with pytest.raises(ModelError, match=r"give prediction_type: 'v_prediction' for 2\.0 and 2\.1 .*'epsilon'"):
        load_model(files[2], tokenizer=folder)
    with pytest.raises(ModelError, match="'v' is not supported; expected one of: epsilon, v_prediction"):
        load_model(files[2], tokenizer=folder, prediction_type="v")


@pytest.mark.parametrize("generation, padding", [(1, 57), (2, 0)])  # 57: the end token of the tests' vocabulary
@pytest.mark.parametrize("own", ["<|endoftext|>", "a"])
def test_prompts_are_filled_up_as_the_generation_was_trained(small, files, folder, tmp_path, generation, padding, own):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = own
    tokenizer.save_pretrained(tmp_path / "words")
    model = load_model(files[generation], tokenizer=tmp_path / "words", prediction_type="epsilon")
    ids = model.tokenizer("b", padding="max_length", max_length=model.tokenizer.model_max_length).input_ids
    assert len(ids) == 77 and ids[2] == 57 and set(ids[3:]) == {padding}


def test_half_precision_becomes_float32(small, files, folder, tmp_path):
    path = changed(files[1], tmp_path / "a.safetensors", lambda t: {k: v.half() for k, v in t.items()})
    model = load_model(path, tokenizer=folder)
    assert {weight.dtype for name in PARTS for weight in getattr(model, name).parameters()} == {torch.float32}


def test_averaged_weights_are_preferred(small, files, folder, parts, tmp_path):
    def averaged(tensors):
        prefix = "model.diffusion_model."
        names = [name for name in tensors if name.startswith(prefix)]
        added = {"model_ema." + "".join(name.split(".")[1:]): tensors[name] for name in names}
        return tensors | added | {name: tensors[name] + 1 for name in names}

    model = load_model(changed(files[1], tmp_path / "a.safetensors", averaged), tokenizer=folder)
    assert torch.equal(model.unet.conv_in.weight, parts[1][0].conv_in.weight)


def test_the_model_does_not_hold_the_file(small, files, folder, tmp_path):
    path = shutil.copy(files[1], tmp_path / "a.safetensors")
    model = load_model(path, tokenizer=folder)
    before = model.unet.conv_in.weight.clone()
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(model.unet.conv_in.weight, before)


def without(prefix):
    return lambda tensors: {name: weight for name, weight in tensors.items() if not name.startswith(prefix)}


def wide(tensors):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    return tensors | {name: tensors[name].repeat(1, 2, 1, 1)}


@pytest.mark.parametrize("change, words", [
    (without("model.diffusion_model."), r"not a whole Stable Diffusion checkpoint.*no model\.diffusion_model\.\*"),
    (without("first_stage_model."), r"no first_stage_model\.\*"),
    (without("cond_stage_model."), r"no cond_stage_model\.transformer\.\* or cond_stage_model\.model\.\*"),
    (without("model.diffusion_model.out.2.bias"), r"'conv_out\.bias' is missing"),
    (wide, r"'conv_in\.weight' has shape \(16, 8, 3, 3\); expected \(16, 4, 3, 3\)"),
    (lambda tensors: {"conditioner.embedders.0.x": torch.ones(1)}, r"Stable Diffusion XL; expected 1\.x or 2\.x"),
    (lambda tensors: {"lora_unet_down.weight": torch.ones(1)}, r"first of 1: 'lora_unet_down.weight'"),
    (lambda tensors: {}, "not a whole Stable Diffusion checkpoint"),
])  # fmt: skip
def test_other_contents(small, files, folder, tmp_path, change, words):
    with pytest.raises(ModelError, match=words):
        load_model(changed(files[1], tmp_path / "a.safetensors", change), tokenizer=folder)


@pytest.mark.parametrize("keep", [0, 5, 4000, -1])
def test_damaged_file(small, files, folder, tmp_path, keep):
    path = tmp_path / "a.safetensors"
    path.write_bytes(files[1].read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"a\.safetensors' cannot be read as safetensors"):
        load_model(path, tokenizer=folder)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
@pytest.mark.parametrize("nested", [True, False])
def test_pickled_file(small, files, folder, parts, tmp_path, suffix, nested):
    """It is refused, and the command the error gives makes a file that loads."""
    path = tmp_path / f"v1{suffix}"
    tensors = load_file(files[1])
    torch.save({"state_dict": tensors, "global_step": 1} if nested else tensors, path)
    with pytest.raises(ModelError, match="is pickled, which can run code and is refused; convert it once") as refused:
        load_model(path, tokenizer=folder)
    exec(re.search(r'python -c "(.*)"', str(refused.value))[1], {})
    model = load_model(tmp_path / "v1.safetensors", tokenizer=folder)
    assert torch.equal(model.unet.conv_in.weight, parts[1][0].conv_in.weight)


def test_the_folder_a_file_lies_in(files):
    with pytest.raises(ModelError, match=r"no unet/; expected .*, or the name of a checkpoint in it, such as 'v1\.saf"):
        load_model(files[1].parent)


@pytest.mark.parametrize("name", ["model.gguf", "model", "photo.png"])
def test_other_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"12345678{}")
    with pytest.raises(ModelError, match=r"is no model; expected a folder, or a file named \*\.safetensors"):
        load_model(tmp_path / name)


def test_command_line(small, files, folder, other_folder, photo, tmp_path, capsys):
    words = ["--model", str(files[2]), "--threads", "1"]
    parts = ["--tokenizer", str(folder), "--captioner", str(other_folder / "captioner")]
    assert main(["info", *words, *parts]) == 1
    assert "give prediction_type: 'v_prediction'" in capsys.readouterr().err
    parts += ["--prediction-type", "v_prediction"]
    assert main(["caption", str(photo), *words, *parts]) == 0
    assert capsys.readouterr().out.strip() == Editor.from_pretrained(other_folder).caption(photo)
    edit = ["edit", str(photo), "a dog", "--out", str(tmp_path / "out"), "--tune-num-steps", "1", "--num-steps", "1"]
    assert main([*edit, "--width", "32", "--height", "32", *words, *parts]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["edits"]


@pytest.mark.parametrize("model, code, words", [
    ("none/such/place", 2, "no model folder or file 'none/such/place'; expected 'bundled', a folder"),
    ("none.safetensors", 2, "no model folder or file 'none.safetensors'"),
    ("none.ckpt", 2, "no model folder or file 'none.ckpt'"),
    ("someone/unknown", 1, "`hf download someone/unknown --local-dir DIR`"),
    ("there.ckpt", 1, "is pickled, which can run code and is refused"),
])  # fmt: skip
def test_command_line_without_a_model(tmp_path, monkeypatch, capsys, model, code, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "there.ckpt").touch()
    assert main(["info", "--model", model]) == code
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1
