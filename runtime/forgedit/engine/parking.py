"""What learning does not touch, in host memory while a photo is learned: a device of 8 GB cannot hold both.

Moved are the float32 originals of the UNet and the text encoder, the VAE and the captioner: 5.3 GB of Stable Diffusion
1.4. Originals are written by nobody, so the host's copies are made once and kept: a photo costs one way, the one back.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from forgedit.weights import Weights

HOST = torch.device("cpu")

log = logging.getLogger("forgedit")


class Parking:
    """Moves a model's weights out of the device's memory and back; between the two the modules cannot be run.

    weights: both sides of the UNet's and the text encoder's, all of them the originals whenever this is called
    others: more modules whose parameters can be moved; None among them is left out
    shared: addresses of memory that a caller's modules hold too. It stays: no room would come of it, and on the way
        back it would exist twice
    host: where weights wait; pinned: in memory that the device reads by itself, where there is such
    """

    def __init__(
        self,
        weights: Weights,
        others: Iterable[Any],
        shared: Collection[int] = (),
        host: torch.device = HOST,
        pinned: bool = True,
    ) -> None:
        self._weights, self._host, self._pinned = weights, host, pinned
        self._parameters: dict[str, Tensor] = dict(weights.working)
        for index, module in enumerate(others):
            if module is not None:
                self._parameters |= {f"{index}.{name}": weight for name, weight in module.named_parameters()}
        together: dict[int, list[str]] = {}  # tied weights are several parameters in one memory, here and there
        for name, weight in self._parameters.items():
            if weight.numel() and weight.data_ptr() not in shared:
                together.setdefault(weight.data_ptr(), []).append(name)
        self._groups = [tuple(names) for names in together.values()]
        self._copies: dict[tuple[str, ...], Tensor] = {}
        self._away: dict[tuple[str, ...], torch.device] = {}  # what waits on the host now, and where it belongs

    def num_bytes(self, but: tuple[str, ...] = ()) -> int:
        """Bytes of what park would move."""
        return sum(self._parameters[names[0]].nbytes for names in self._chosen(but))

    def park(self, but: tuple[str, ...] = ()) -> None:
        """Move everything to the host, but weights whose names begin so. What is there already stays there.

        Raises: RuntimeError if the host lacks the memory; restore() then undoes what was done
        """
        for names in self._chosen(but):
            if names not in self._away:
                weight = self._parameters[names[0]].data
                if names not in self._copies:
                    self._copies[names] = self._copied(weight)
                self._away[names] = weight.device
                self._place(names, self._copies[names])

    def restore(self) -> None:
        """Move everything back to where it was; what is not there afterwards, as this raised, is for the next time."""
        for names, device in list(self._away.items()):
            copy = self._copies[names]
            self._place(names, torch.empty_like(copy, device=device).copy_(copy, non_blocking=True))
            del self._away[names]

    def release(self) -> None:
        """Let go of the host's copies, but of what waits there."""
        self._copies = {names: self._copies[names] for names in self._away}

    def _chosen(self, but: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [names for names in self._groups if not any(name.startswith(but) for name in names)]

    def _place(self, names: tuple[str, ...], value: Tensor) -> None:
        for name in names:
            if name in self._weights.working:
                self._weights.place(name, value)
            else:
                self._parameters[name].data = value

    def _copied(self, weight: Tensor) -> Tensor:
        if self._pinned:
            try:
                return torch.empty_like(weight, device=self._host, pin_memory=True).copy_(weight)
            except RuntimeError as error:
                self._pinned = False
                log.warning("host memory cannot be pinned, and copies will be slower: %s", str(error).splitlines()[0])
        return torch.empty_like(weight, device=self._host).copy_(weight)
