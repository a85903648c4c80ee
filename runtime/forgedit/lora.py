"""A session as a LoRA file: each weight's change as a product of two thin matrices, for diffusers and PEFT.

The best rank-r approximation of a change D in the Frobenius norm is D's own projection on its r strongest left singular
vectors U: D_r = U (U^T D) (Eckart & Young 1936). U comes from the eigenvectors of D D^T, [shorter side, shorter side],
in float64, which squaring leaves 8 digits: faster than an SVD of D, and with the same error (docs/log.md).

The file: '<part>.<module>.lora_A.weight' [r, in] or, of a convolution, [r, in, height, width], and 'lora_B.weight'
[out, r] or [out, r, 1, 1], float32; every pair has the same rank, so that one alpha = r makes every reader's scale 1.
Metadata: 'lora_adapter_metadata', PEFT's LoraConfig by part, as diffusers reads it; 'forgedit', JSON with the source
embedding, which is half of what was learned, caption, strategy, keep, and the base model's fingerprint. Biases, norms
and token embeddings have no place in a LoRA that diffusers reads.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import pad

from forgedit.delta import squared_distance
from forgedit.engine.numerics import true_float32
from forgedit.errors import SessionError
from forgedit.session_file import write_tensors


@dataclass(frozen=True)
class SavedLora:
    """What Session.export_lora wrote.

    path: of the file, num_bytes: its size; rank: of every pair
    relative_error: |D - D_r| / |D| over the whole change D, what was left out included; Euclidean norms, in float64
    left_out: names of changed weights that no LoRA can hold; left_out_error: what relative_error would be without
        any rounding of the others, so the least that a higher rank can reach
    """

    path: Path
    rank: int
    num_bytes: int
    relative_error: float
    left_out: tuple[str, ...]
    left_out_error: float


@torch.no_grad()
def write_lora(
    path: Path,
    rank: int,
    parts: Mapping[str, nn.Module],
    merged: Iterable[tuple[str, Tensor]],
    original: Mapping[str, Tensor],
    embedding: Tensor,
    record: dict[str, Any],
) -> SavedLora:
    """Factor every change and write the file, atomically.

    rank: 1 or more; of a matrix with a shorter side than that, the rest are zeros
    parts: the modules by 'unet' and 'text_encoder', which say what is linear
    merged, original: value of each tuned weight now and before, by prefixed name
    embedding: [1, T, D] float32; record: what else goes into the file, for JSON
    Raises: ValueError for the rank, or a change that is not finite or is nothing; OSError, with no partial file left
    """
    factorable = {name for part, module in parts.items() for name in _linear_weights(part, module)} & original.keys()
    if not factorable:
        raise ValueError(
            f"none of the {len(original)} tuned weights is a matrix or a convolution; a LoRA would be empty"
        )
    most = max(min(original[name].flatten(1).shape) for name in factorable)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        allowed = f"a whole number from 1 to {most}, the longest of the weights' shorter sides"
        raise ValueError(f"rank {rank!r} is out of range; expected {allowed}")
    tensors: dict[str, Tensor] = {}
    left_out = []
    change = wrong = missed = torch.zeros((), dtype=torch.float64, device=embedding.device)
    with true_float32():
        for name, weight in merged:
            size = squared_distance(weight, original[name])
            if not size.isfinite():
                raise ValueError(f"the change of {name!r} is not finite; a LoRA cannot hold it")
            change = change + size
            if not size:
                continue
            if name not in factorable:
                left_out.append(name)
                missed = missed + size
                continue
            difference = weight.float() - original[name].float()
            matrix = difference.flatten(1)
            b, a = factor(matrix, rank)
            wrong = wrong + squared_distance(b @ a, matrix)
            module, out = name.removesuffix(".weight"), difference.shape[0]
            tensors[f"{module}.lora_A.weight"] = a.view(rank, *difference.shape[1:]).cpu().contiguous()
            tensors[f"{module}.lora_B.weight"] = b.view(out, rank, *(1,) * (difference.ndim - 2)).cpu().contiguous()
    if not tensors:
        raise ValueError("nothing that a LoRA can hold has changed; was everything forgotten?")
    error, least = math.sqrt((wrong + missed) / change), math.sqrt(missed / change)
    little_endian = embedding.detach().cpu().numpy().astype("<f4")
    record = record | {
        "rank": rank,
        "relative_error": error,
        "embedding_shape": list(embedding.shape),
        "embedding_float32": base64.b64encode(little_endian.tobytes()).decode(),
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(_peft_config(tensors, rank))}
    num_bytes = write_tensors(path, tensors, metadata | {"forgedit": json.dumps(record)})
    return SavedLora(path, rank, num_bytes, error, tuple(left_out), least)


def factor(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """b [m, rank] and a [rank, n] whose product is the nearest of that rank to a float32 matrix [m, n].

    Both carry the root of each singular value, so that neither falls out of float16's range where it is read as such.
    """
    if matrix.shape[0] > matrix.shape[1]:
        b, a = factor(matrix.T, rank)
        return a.T, b.T
    wide = matrix.double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)  # by rising eigenvalue
    u = vectors[:, -rank:]
    rows = u.T @ wide
    roots = rows.norm(dim=1).sqrt().clamp(min=1e-30)  # not 0, where the matrix is of a lower rank
    missing = max(0, rank - len(rows))
    b, a = u * roots, rows / roots[:, None]
    return pad(b, (0, missing)).float(), pad(a, (0, 0, 0, missing)).float()


def source_embedding(path: str | Path) -> Tensor:
    """e_src, [1, T, D] float32 on the CPU, from a file that Session.export_lora wrote.

    Raises: SessionError if it is no such file; OSError if there is none
    """
    path = Path(path)
    path.stat()
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})["forgedit"])
    except SafetensorError as error:
        raise SessionError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error
    except KeyError as error:
        raise SessionError(f"{str(path)!r} is no LoRA that forgedit exported: its metadata lacks {error}") from error
    values = np.frombuffer(base64.b64decode(record["embedding_float32"]), "<f4").astype(np.float32)
    return torch.from_numpy(values).view(record["embedding_shape"])


def _linear_weights(part: str, module: nn.Module) -> list[str]:
    """Names of the weights whose change can be a pair: of linear layers, and of convolutions in one group."""
    return [
        f"{part}.{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    ]


def _peft_config(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Any]:
    """PEFT's LoraConfig of each part, its settings prefixed with the part: scale 1, as alpha is the rank."""
    config: dict[str, Any] = {}
    for name in tensors:
        part, _, module = name.partition(".")
        config |= {f"{part}.r": rank, f"{part}.lora_alpha": rank}
        modules = config.setdefault(f"{part}.target_modules", [])
        if name.endswith(".lora_A.weight"):
            modules.append(module.removesuffix(".lora_A.weight"))
    return config
