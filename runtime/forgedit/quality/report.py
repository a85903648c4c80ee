"""The report of one run: every setting, seed, version, backend, seconds and bytes, as one JSON file."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from forgedit.atomic import write_atomic
from forgedit.quality.metrics import psnr
from forgedit.session import Edit, Session

try:
    import resource
except ModuleNotFoundError:  # Windows has none
    resource = None  # type: ignore[assignment]


def describe_edit(edit: Edit, session: Session, file: str, picture: Image.Image | None = None) -> dict[str, Any]:
    """One edit's part of the report.

    file: where the picture lies, relative to the report
    picture: what it shows, at the edited size, where that is not the whole edit
    cut: the target's words beyond the model's tokens; '' if none
    is_reference_schedule: whether the denoising is the method's, or another scheduler's
    psnr_to_original: decibels against session.source, at the edited size; None if equal (JSON has no infinity)
    """
    return {
        "file": file,
        "cut": edit.cut,
        "psnr_to_original": psnr_to_original(picture or edit.image, session),
        "settings": asdict(edit.config),
        "is_reference_schedule": edit.config.scheduler == "ddim",
        "seconds": edit.seconds,
    }


def psnr_to_original(picture: Image.Image, session: Session) -> float | None:
    """Decibels against session.source, of its size; None if equal."""
    decibels = psnr(picture, session.source)
    return decibels if math.isfinite(decibels) else None


def make_report(
    session: Session, target: str, edits: Sequence[dict[str, Any]], seconds: dict[str, float], **more: Any
) -> dict[str, Any]:
    """The whole report. Sizes are width and height in pixels: the photo's, which the files have, and the model's.

    edits: as describe_edit gives them; seconds: what neither session nor edits timed, such as loading the model
    more: further entries, such as the command or the chosen edit
    """
    return {
        "forgedit": version("forgedit"),
        **session.editor.info(),
        "threads": torch.get_num_threads(),
        **more,
        "target": target,
        "caption": session.caption,
        "photo_size": list(session.photo_size or session.source.size),
        "edited_size": list(session.source.size),
        "tune": {
            "settings": asdict(session.config),
            "losses": list(session.losses),
            "stopped_early": session.stopped_early,
            "way": session.way,
            "seconds": session.seconds,
        },
        "edits": list(edits),
        "seconds": seconds,
        "peak_bytes": peak_bytes(torch.device(session.editor.info()["device"])),
        "recommended": asdict(session.editor.defaults),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    packages = ("torch", "diffusers", "transformers", "safetensors", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def peak_bytes(device: torch.device) -> dict[str, int | None]:
    """The most memory held so far, in bytes: the process's resident set (None if the system does not tell), and on a
    CUDA device what torch allocated there."""
    held: int | None = None
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    cuda = {"cuda": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    return {"process": held, **cuda}


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report, indented, atomically; missing folders are made. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write_text(json.dumps(report, indent=2, allow_nan=False), encoding="utf-8"))
