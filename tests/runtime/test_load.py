"""Model folders: what is read from them, and what is refused with which words."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from forgedit import EditConfig, Editor, ModelError, TuneConfig
from forgedit.model.load import BUNDLED


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def edit_json(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def test_missing_folder(tmp_path):
    with pytest.raises(ModelError, match="no model folder"):
        Editor.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_part(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=f"no {part}/"):
        Editor.from_pretrained(copy)


def test_pickled_weights_are_refused(copy):
    (weights,) = (copy / "unet").glob("*.safetensors")
    torch.save(load_file(weights), copy / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"pickled.*refused; convert them once"):
        Editor.from_pretrained(copy)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_missing_weights_are_not_made_up(copy, part):
    (path,) = (copy / part).glob("*.safetensors")
    weights = load_file(path)
    dropped = sorted(weights)[3]
    del weights[dropped]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights"):
        Editor.from_pretrained(copy)


@pytest.mark.parametrize("prediction_type", ["sample", "v-prediction"])
def test_other_prediction_type(copy, prediction_type):
    edit_json(copy / "scheduler" / "scheduler_config.json", prediction_type=prediction_type)
    with pytest.raises(ModelError, match=f"'{prediction_type}' is not supported; expected one of: epsilon, v_pred"):
        Editor.from_pretrained(copy)


@pytest.mark.parametrize("declared", ["epsilon", "v_prediction"])
def test_prediction_type(copy, declared):
    edit_json(copy / "scheduler" / "scheduler_config.json", prediction_type=declared)
    assert Editor.from_pretrained(copy).model.prediction_type == declared
    assert Editor.from_pretrained(copy, prediction_type="v_prediction").model.prediction_type == "v_prediction"
    with pytest.raises(ModelError, match="'velocity' is not supported"):
        Editor.from_pretrained(copy, prediction_type="velocity")


def test_schedulers_of_published_folders_do_not_change_the_method(copy, editor):
    """SD 1.4's folder says PNDM with steps_offset 1; only its betas are the model's."""
    edit_json(
        copy / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler", steps_offset=1, set_alpha_to_one=True
    )
    assert torch.equal(Editor.from_pretrained(copy).model.alphas_cumprod, editor.model.alphas_cumprod)


def test_recommended_settings(copy, editor):
    assert editor.model.resolution == 32 and editor.defaults.tune == TuneConfig()
    edit_json(copy / "forgedit.json", resolution=48, tune={"unet_lr": 6e-4}, edit={"strategy": "encoderattn"})
    other = Editor.from_pretrained(copy)
    assert other.model.resolution == 48
    assert other.defaults.tune == TuneConfig(unet_lr=6e-4)
    assert other.defaults.edit == EditConfig(strategy="encoderattn")


@pytest.mark.parametrize("content", ['{"tune": {"lr": 1}}', '{"edit": {"keep": 2}}', '{"tunes": {}}', "{"])
def test_settings_that_are_not_known(copy, content):
    (copy / "forgedit.json").write_text(content)
    with pytest.raises(ModelError, match=r"forgedit\.json"):
        Editor.from_pretrained(copy)


def test_without_a_captioner(copy, photo):
    shutil.rmtree(copy / "captioner")
    editor = Editor.from_pretrained(copy)
    with pytest.raises(ModelError, match="no captioner"):
        editor.tune(photo, TuneConfig(num_steps=1))
    assert editor.tune(photo, TuneConfig(num_steps=1, caption="a cat")).caption == "a cat"


def test_half_precision_weights_are_loaded_as_float32(copy):
    (path,) = (copy / "unet").glob("*.safetensors")
    save_file({name: weight.half() for name, weight in load_file(path).items()}, path, {"format": "pt"})
    editor = Editor.from_pretrained(copy)
    assert {weight.dtype for weight in editor.model.unet.parameters()} == {torch.float32}


@pytest.mark.skipif(not (BUNDLED / "unet").is_dir(), reason="the bundled model's weights are not in this checkout")
def test_the_bundled_model_edits():
    editor = Editor.from_pretrained("bundled")
    photo = Image.new("RGB", (editor.model.resolution,) * 2, "red")
    session = editor.tune(photo, editor.defaults.tune.replace(num_steps=1))
    assert session.edit("a blue ball", EditConfig(num_steps=2)).image.size == session.source.size


def test_loading_prints_nothing(folder, capfd):
    Editor.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")
