"""Hub ids: from the local cache, else from the hub, else an error at once that says what would help."""

import shutil
import socket
import time

import huggingface_hub.constants
import pytest

from forgedit import Editor, ModelError
from forgedit.model import hub, load_model
from forgedit.model.load import find_captioner, find_model, find_tokenizer
from tests.runtime.hub import cached, served

NAME = "someone/small-diffusion"


@pytest.fixture(scope="module")
def repository(folder, tmp_path_factory):
    """A hub's model: the small random pipeline, with what else lies in published ones."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("repository") / "model")
    (copy / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for other in ("unet/diffusion_pytorch_model.bin", "v1.ckpt", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (copy / other).write_bytes(b"not to be downloaded")
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "model.safetensors").write_bytes(b"not to be downloaded")
    return copy


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network, as far as the hub's client knows."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def online(monkeypatch):
    def at(address):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        files = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)

    return at


@pytest.mark.parametrize("name, expected", [
    ("CompVis/stable-diffusion-v1-4", True),
    ("a/b", True),
    ("bundled", False),
    ("./model", False),
    ("/model", False),
    ("model/", False),
    ("a/b/c", False),
    ("a/../b", False),
    ("models/v1.safetensors", False),
    ("models/v1.ckpt", False),
    ("a b/c", False),
])  # fmt: skip
def test_what_can_be_a_hub_id(name, expected):
    assert hub.is_hub_id(name) == expected


def test_from_the_cache_without_a_network(cache, folder, repository, editor):
    cached(cache, NAME, repository)
    assert Editor.from_pretrained(NAME).fingerprint == editor.fingerprint


def test_captioner_and_tokenizer_from_the_cache(cache, folder, photo, editor, tmp_path):
    plain = shutil.copytree(folder, tmp_path / "plain")
    shutil.rmtree(plain / "captioner")
    shutil.rmtree(plain / "tokenizer")
    cached(cache, "someone/blip", folder / "captioner")
    cached(cache, "someone/clip", folder / "tokenizer")
    loaded = Editor.from_pretrained(plain, captioner="someone/blip", tokenizer="someone/clip")
    assert loaded.caption(photo) == editor.caption(photo)
    assert loaded.model.tokenizer("a cat").input_ids == editor.model.tokenizer("a cat").input_ids


@pytest.mark.parametrize("find", [find_model, find_captioner, find_tokenizer])
def test_neither_cached_nor_online(cache, find):
    with pytest.raises(ModelError) as refused:
        find(NAME)
    message = str(refused.value)
    assert f"no folder '{NAME}'" in message and f"`hf download {NAME} --local-dir DIR`" in message
    assert "offline mode is enabled" in message and "\n" not in message


def test_a_single_file_takes_clips_tokenizer(cache, folder, tmp_path):
    """It is looked for before the file is read, which may be of gigabytes."""
    path = tmp_path / "v1.safetensors"
    path.write_bytes(b"no weights")
    command = "hf download openai/clip-vit-large-patch14 vocab.json merges.txt --local-dir DIR"
    with pytest.raises(ModelError, match=f"without a tokenizer.*give tokenizer: .*{command}"):
        load_model(path)
    cached(cache, "openai/clip-vit-large-patch14", folder / "tokenizer")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load_model(path)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"])
def test_a_copy_in_part_is_no_copy(cache, repository, tmp_path, part):
    copy = shutil.copytree(repository, tmp_path / "part")
    (copy / part).unlink()
    if not any((copy / part).parent.iterdir()):
        (copy / part).parent.rmdir()
    for name in copy.glob("unet/*.fp16.safetensors"):
        name.unlink()
    cached(cache, NAME, copy)
    with pytest.raises(ModelError, match="nor a whole copy"):
        load_model(NAME)


def test_download(cache, online, repository, editor, caplog, capfd):
    with served(NAME, repository) as (address, asked):
        online(address)
        loaded = Editor.from_pretrained(NAME)
    assert loaded.fingerprint == editor.fingerprint
    assert [record.message for record in caplog.records if record.name == "forgedit"] == [
        f"downloading {NAME} from the hub"
    ]
    assert capfd.readouterr() == ("", "")
    fetched = {path.partition("resolve/")[2].partition("/")[2] for path in asked if "resolve/" in path}
    assert "unet/diffusion_pytorch_model.safetensors" in fetched and "captioner/config.json" in fetched
    assert not any("fp16" in path or path.endswith((".bin", ".ckpt")) or "safety" in path for path in fetched)
    assert Editor.from_pretrained(NAME).fingerprint == editor.fingerprint  # the hub is gone: from the cache


def test_a_hub_with_pickled_weights_alone(cache, online, folder, tmp_path):
    """As Salesforce/blip-image-captioning-base."""
    copy = shutil.copytree(folder / "captioner", tmp_path / "blip")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with served(NAME, copy) as (address, asked):
        online(address)
        with pytest.raises(ModelError, match="not have every part as safetensors; pickled weights are refused"):
            find_captioner(NAME)
    assert not any(path.endswith(".bin") for path in asked)


def test_a_name_the_hub_does_not_know(cache, online, repository):
    with served(NAME, repository) as (address, _):
        online(address)
        with pytest.raises(ModelError, match=r"the hub shows none: check the name.*hf auth login"):
            load_model("someone/else")


def test_a_hub_that_does_not_answer_costs_seconds(cache, online, monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        port = silent.getsockname()[1]
        online(f"http://127.0.0.1:{port}")
        begin = time.monotonic()
        with pytest.raises(ModelError, match="asking the hub failed"):
            load_model(NAME)
        assert time.monotonic() - begin < 60  # its own retries take minutes
    with pytest.raises(ModelError, match=r"asking the hub failed \(.*refused"):
        load_model(NAME)


def test_a_folder_goes_before_the_hub(cache, folder, tmp_path, monkeypatch, editor):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / NAME).symlink_to(folder)
    assert Editor.from_pretrained(NAME).fingerprint == editor.fingerprint
