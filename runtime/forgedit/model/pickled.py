"""Pickled weights run code when they are read: they are refused everywhere, with the way to convert them."""

from __future__ import annotations

from pathlib import Path

from forgedit.errors import ModelError

PICKLED = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def refuse_pickled_file(path: Path) -> None:
    """Raises: ModelError if a file, there or not, is named as a pickled checkpoint is."""
    if path.suffix.lower() not in PICKLED:
        return
    converted = path.with_suffix(".safetensors")
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"w = torch.load({str(path)!r}, map_location='cpu', weights_only=True); w = w.get('state_dict', w); "
        f"save_file({{k: v.clone() for k, v in w.items() if torch.is_tensor(v)}}, {str(converted)!r})"
    )
    raise ModelError(
        f'{str(path)!r} is pickled, which can run code and is refused; convert it once: python -c "{code}"'
    )


def refuse_pickled_part(folder: Path, kind: str) -> None:
    """For a part's folder without safetensors. kind: the class its weights are for. Raises: ModelError, always."""
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLED)
    if not pickled:
        raise ModelError(f"{folder.name}/ holds no weights; expected *.safetensors in {str(folder)!r}")
    package = "transformers" if kind.startswith(("CLIP", "Blip")) else "diffusers"
    code = (
        f"from {package} import {kind}; "
        f"{kind}.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained({str(folder)!r})"
    )
    raise ModelError(
        f"{folder.name}/ holds only pickled weights ({', '.join(pickled)}), which can run code and are refused; "
        f'convert them once: python -c "{code}"'
    )
