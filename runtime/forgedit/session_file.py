"""The session file: one safetensors file of tensors and a record, and the checks before any of it is believed.

Metadata: format_version; base_fingerprint, of the model it was tuned on; record, what is no tensor, as JSON;
payload_sha256, over all other metadata and each tensor's own SHA-256, as a flipped bit loads silently otherwise.
Tensors are hashed in as many threads as torch computes with: one thread's SHA-256 is slower than a disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from forgedit.atomic import write_atomic
from forgedit.errors import SessionError

FORMAT_VERSION = 3
T = TypeVar("T")


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
    return write_tensors(path, tensors, metadata)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """Write a safetensors file atomically, of tensors on the CPU and contiguous.

    Returns: bytes
    Raises: OSError, with no partial file left
    """

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
            mapped = {name: file.get_tensor(name) for name in file.keys()}
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
    read = _in_threads(_read, mapped)
    if _payload_digest({name: digest for name, (_, digest) in read.items()}, metadata) != metadata["payload_sha256"]:
        raise SessionError(f"{str(path)!r} was altered: its payload does not have the SHA-256 it was saved with")
    return {name: tensor for name, (tensor, _) in read.items()}, json.loads(metadata["record"])


def base_fingerprint(weights: Mapping[str, Tensor], prediction_type: str) -> str:
    """SHA-256, in hex, of what is tuned: names, shapes, dtypes and bytes of tensors, and what the UNet predicts."""
    digest = hashlib.sha256(prediction_type.encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def payload_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256, in hex, of all tensors, on the CPU and contiguous, and all metadata but itself."""
    return _payload_digest(_in_threads(_tensor_digest, tensors), metadata)


def _payload_digest(digests: Mapping[str, str], metadata: Mapping[str, str]) -> str:
    words = [metadata[key] for key in ("format_version", "base_fingerprint", "record")]
    return hashlib.sha256(json.dumps([words, sorted(digests.items())]).encode()).hexdigest()


def _read(mapped: Tensor) -> tuple[Tensor, str]:
    """A copy of a tensor mapped from the file, and its digest.

    The copy is what was checked. The file is not: another program may write to it, or cut it short, which ends a
    process that reads its map.
    """
    copy = torch.from_numpy(_bytes(mapped).numpy().copy()).view(mapped.dtype).view(mapped.shape)
    return copy, _tensor_digest(copy)


def _tensor_digest(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(_bytes(tensor).numpy().data).hexdigest()}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _in_threads(work: Callable[[Tensor], T], tensors: Mapping[str, Tensor]) -> dict[str, T]:
    """The result of `work`, which copies or hashes and so leaves the interpreter to other threads, for each tensor."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(work, tensors.values()), strict=True))
