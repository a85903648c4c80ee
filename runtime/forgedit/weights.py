"""Both sides of every weight: the original, never written, and the working one that tuning and editing write to.

A working weight shares its original's memory except while it holds something else, so what a profile freezes exists
once, and bringing an original back copies nothing and cannot fail half-way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Weights:
    """The weights of one model's UNet and text encoder, by name, prefixed 'unet.' or 'text_encoder.'.

    unet, text_encoder: frozen modules; their parameters are the working weights from here on, and the memory they come
        with is the originals'. It may be another module's too: it is read only.
    original, working: both sides; changed: names whose working weight has memory of its own
    """

    def __init__(self, unet: Any, text_encoder: Any) -> None:
        self.working = {f"unet.{name}": weight for name, weight in unet.named_parameters()}
        self.working |= {f"text_encoder.{name}": weight for name, weight in text_encoder.named_parameters()}
        self.original: dict[str, Tensor] = {name: weight.data for name, weight in self.working.items()}
        self.changed: set[str] = set()

    def make_writable(self, names: Iterable[str]) -> None:
        """Give working weights memory of their own, with the values they have; needed before any write to them."""
        for name in set(names) - self.changed:
            self.working[name].data = self.working[name].data.clone()
            self.changed.add(name)

    def restore(self, names: Iterable[str] | None = None) -> None:
        """Let working weights, all of them or `names`, be the originals again: frozen and without a gradient."""
        for name in self.changed if names is None else self.changed.intersection(names):
            weight = self.working[name].requires_grad_(False)
            weight.grad = None
            weight.data = self.original[name]
        self.changed = set() if names is None else self.changed.difference(names)

    def place(self, name: str, value: Tensor) -> None:
        """Let an original, and the working weight that shares its memory, lie in `value`, which is equal to it.

        Of originals only the entry is replaced: whoever holds the tensor of before, in another thread, keeps it.
        value: on any device
        Raises: ValueError if the working weight has memory of its own
        """
        if name in self.changed:
            raise ValueError(f"{name!r} is not its original now; restore it first")
        self.original[name] = self.working[name].data = value

    def take(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The working weights of `names`, handed over without a copy; all working weights are the originals again."""
        taken = {name: self.working[name].data for name in names}
        self.restore()
        return taken
