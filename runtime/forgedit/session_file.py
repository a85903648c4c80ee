"""The session file: one safetensors file of tensors and a record, and the checks before any of it is believed.

Metadata: format_version; base_fingerprint, of the model it was tuned on; record, what is no tensor, as JSON;
payload_sha256, over all tensors and all other metadata, as a flipped bit loads silently otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from forgedit.atomic import write_atomic
from forgedit.errors import SessionError

FORMAT_VERSION = 2


def write_session_file(path: Path, tensors: dict[str, Tensor], record: dict[str, Any], fingerprint: str) -> int:
    """Write tensors, on the CPU and contiguous, and record, atomically.

    fingerprint: the base model's
    Returns: bytes
    Raises: OSError, with no partial file left
    """
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "base_fingerprint": fingerprint,
        "record": json.dumps(record),
    }
    metadata["payload_sha256"] = payload_digest(tensors, metadata)

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # it tells of a full disk in words alone: "… (os error 28)"
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error

    return write_atomic(path, write)


def read_session_file(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a file that is readable, of the known version, of this base model, and unaltered.

    Raises: SessionError saying which check failed; OSError if there is no such file
    """
    path.stat()
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise SessionError(f"{str(path)!r} is truncated or not a session: {error}") from error
    missing = {"format_version", "base_fingerprint", "record", "payload_sha256"} - metadata.keys()
    if missing:
        raise SessionError(f"{str(path)!r} is not a session: its metadata lacks {', '.join(sorted(missing))}")
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise SessionError(f"session format {metadata['format_version']!r} is not known; expected {FORMAT_VERSION}")
    if metadata["base_fingerprint"] != fingerprint:
        raise SessionError(
            f"the session was tuned on base model {metadata['base_fingerprint']}, this editor's is {fingerprint}; "
            "load the model it was tuned on"
        )
    if payload_digest(tensors, metadata) != metadata["payload_sha256"]:
        raise SessionError(f"{str(path)!r} was altered: its payload does not have the SHA-256 it was saved with")
    return tensors, json.loads(metadata["record"])


def base_fingerprint(weights: Mapping[str, Tensor], prediction_type: str) -> str:
    """SHA-256, in hex, of what is tuned: names, shapes, dtypes and bytes of tensors, and what the UNet predicts."""
    return _digest(weights, prediction_type)


def payload_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256, in hex, of all tensors and all metadata but itself."""
    return _digest(tensors, json.dumps([metadata[key] for key in ("format_version", "base_fingerprint", "record")]))


def _digest(tensors: Mapping[str, Tensor], words: str) -> str:
    digest = hashlib.sha256(words.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
