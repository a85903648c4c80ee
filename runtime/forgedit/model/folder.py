"""Parts of a model from folders in diffusers' layout: local files and safetensors only, in float32."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors import SafetensorError
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from forgedit.config import Defaults
from forgedit.errors import ModelError
from forgedit.model.pickled import refuse_pickled_part

PREDICTION_TYPES = ("epsilon", "v_prediction")


def part(folder: Path, name: str) -> Path:
    """The folder of one part. Raises: ModelError if it is not there."""
    if not (folder / name).is_dir():
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        hint = f", or the name of a checkpoint in it, such as {files[0]!r}" if files else ""
        raise ModelError(f"the model folder has no {name}/; expected diffusers' layout at {str(folder)!r}{hint}")
    return folder / name


def read_weights(kind: Any, folder: Path, **dtype: torch.dtype) -> Any:
    """One module of class `kind`, from a folder with config.json and safetensors, which may be of half precision.

    dtype: torch_dtype=float32 for diffusers, dtype=float32 for transformers, which call it so
    Raises: ModelError for pickled, missing, cut or unfitting weights
    """
    files = [path.name for path in folder.glob("*.safetensors")]
    if not files:
        refuse_pickled_part(folder, kind.__name__)
    read_json(folder / "config.json")  # the libraries' own errors speak of the hub
    variant = "fp16" if all(".fp16." in name for name in files) else None
    try:
        with _no_bars():
            module, report = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, variant=variant, output_loading_info=True, **dtype
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder.name}/ cannot be read: {str(error).strip().splitlines()[0]}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{folder.name}/ lacks {len(missing)} weights of its configuration, such as {missing[0]!r}")
    return module


def read_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer. Raises: ModelError where its files are not all in the folder."""
    if not has_tokenizer(folder):  # transformers would make one up, without words
        raise ModelError(f"no tokenizer in {str(folder)!r}; expected vocab.json and merges.txt, or tokenizer.json")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def read_captioner(folder: Path) -> tuple[Any, Any]:
    """BLIP and its processor. Raises: ModelError for another kind of model, and as read_weights does."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "blip":
        raise ModelError(f"the captioner in {str(folder)!r} is of type {kind!r}; expected 'blip', as for captions")
    captioner = read_weights(BlipForConditionalGeneration, folder, dtype=torch.float32)
    try:
        return captioner, BlipProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the captioner's processor cannot be read: {str(error).splitlines()[0]}") from error


def noise_schedule(config: Mapping[str, Any]) -> tuple[Tensor, str]:
    """alphas_cumprod [train steps] float32 and prediction type of a scheduler's configuration, whatever its class.

    Only what the model was trained with is read: steps_offset and the like are the method's own.
    Raises: ModelError for a prediction type that is not supported
    """
    trained_with = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    known = {name: config[name] for name in (*trained_with, "rescale_betas_zero_snr") if name in config}
    alphas_cumprod: Tensor = DDIMScheduler(**known).alphas_cumprod
    return alphas_cumprod, checked_prediction_type(config.get("prediction_type", "epsilon"))


def checked_prediction_type(prediction_type: str) -> str:
    """Raises: ModelError for one that is not supported."""
    if prediction_type not in PREDICTION_TYPES:
        expected = ", ".join(PREDICTION_TYPES)
        raise ModelError(f"prediction_type {prediction_type!r} is not supported; expected one of: {expected}")
    return prediction_type


def read_recommended(path: Path, resolution: int) -> tuple[int, Defaults]:
    """The folder's own resolution in pixels and settings; `resolution` and METHOD's where it says nothing."""
    recommended = read_json(path) if path.exists() else {}
    try:
        return int(recommended.pop("resolution", resolution)), Defaults.merged(recommended)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path.name} holds settings that are not known: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: ModelError if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.parent.name}/{path.name} holds no JSON object")
    return content


@contextmanager
def _no_bars() -> Iterator[None]:
    """No loading bars from transformers: a library prints nothing. Its setting is put back."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
