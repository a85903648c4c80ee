"""What the engine's UNet holds, weight by weight, so that a change of photo or strategy writes only what differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from forgedit.stages.forget import forgotten_names
from forgedit_kernels import backend_for, merge_weights

UNKNOWN = object()  # what a weight holds while it is written; equal to nothing


class ResidentWeights:
    """The forgetting merge, in place, into the buffers that the engine (and its captured graphs) reads.

    resident: the engine's weights by name; original: the same names, shapes and device, of another dtype or layout
    perhaps, never written; resident holds these values now
    version: grows with every change, for what is computed from the weights and kept
    """

    def __init__(self, resident: Mapping[str, Tensor], original: Mapping[str, Tensor], backend: str = "auto") -> None:
        self.version = 0
        self._resident, self._original = resident, original
        told = backend_for("merge_weights", backend)
        # native keeps the layout, which a convolution's weights change: it serves what it can, and 'auto' the rest
        self._backend = "auto" if told == "native" else told
        self._held: dict[str, object] = {}  # (owner, share kept) by name; a name that is absent holds the original

    def restore(self) -> None:
        """Hold the originals."""
        self.load(None, {}, "none", 0.0)

    def expect_writes(self, names: Iterable[str]) -> None:
        """Another is about to write these weights: what they hold is not known until they are loaded again."""
        self._held.update(dict.fromkeys(names, UNKNOWN))
        self.version += 1

    def load(self, owner: object, tuned: Mapping[str, Tensor], strategy: str, keep: float) -> bool:
        """Hold keep * tuned + (1 - keep) * original where the strategy matches, tuned elsewhere (METHOD section 4).

        owner: whose weights these are; equal for equal weights, such as a weak reference to their session
        tuned: tuned weights by name, a subset of the UNet's; the others are the originals
        Returns: whether anything had to be written. If it raises, what was not finished is written anew next time
        Raises: ValueError for an unknown strategy, or one that matches no tuned weight
        """
        shares = dict.fromkeys(tuned, 1.0) | dict.fromkeys(forgotten_names(tuned, strategy), keep)
        wanted: dict[str, object] = {name: (owner, share) for name, share in shares.items() if share > 0}
        stale = [name for name in self._held.keys() | wanted if self._held.get(name) != wanted.get(name)]
        if not stale:
            return False
        self.version += 1
        self._held.update(dict.fromkeys(stale, UNKNOWN))
        groups: dict[float, list[str]] = {}
        for name in stale:
            groups.setdefault(shares.get(name, 0.0), []).append(name)
        for share, names in groups.items():
            original = [self._original[name] for name in names]
            merge_weights(
                original=original,
                tuned=[tuned[name] for name in names] if share else original,
                keep=share,
                out=[self._resident[name] for name in names],
                backend=self._backend,
            )
        self._held = wanted
        return True
