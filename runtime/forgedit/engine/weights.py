"""What the engine's UNet holds, weight by weight, so that a change of photo or strategy writes only what differs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forgedit.model.fuse import FusedUNet
from forgedit.stages.forget import forgotten_names
from forgedit_kernels import MergePlan, backend_for, merge_weights

MOST_PLANS = 8  # kept of one session: from strategy to strategy and back, between a few of them
UNKNOWN = object()  # what a weight holds while it is written; equal to nothing


@dataclass(frozen=True)
class _Kept:
    """A merge listed before. names: in the plan's order; addresses: of its tuned tensors' storage then

    original: by name, where an entry may have been replaced since
    """

    original: Mapping[str, Tensor]
    names: Sequence[str]
    plan: MergePlan
    addresses: Sequence[int]

    def is_of(self, tuned: Mapping[str, Tensor]) -> bool:
        """Whether it would still merge these tensors: the same ones, where they were."""
        listed = zip(self.names, self.plan.original, self.plan.tuned, self.addresses, strict=True)
        return all(
            self.original[name] is before and tuned[name] is weight and weight.data_ptr() == address
            for name, before, weight, address in listed
        )


class ResidentWeights:
    """The forgetting merge, in place, into the buffers that the engine (and its captured graphs) reads.

    resident: the engine's weights by name; original: the same names and shapes, of another dtype or layout perhaps,
    never written; resident holds these values now. An entry may be replaced by an equal tensor on another device
    version: grows with every change, for what is computed from the weights and kept
    """

    def __init__(self, resident: Mapping[str, Tensor], original: Mapping[str, Tensor], backend: str = "auto") -> None:
        self.version = 0
        self._resident, self._original = resident, original
        told = backend_for("merge_weights", backend)
        # native keeps the layout, which a convolution's weights change: it serves what it can, and 'auto' the rest
        self._backend = "auto" if told == "native" else told
        # by session (or by this, for what restores originals), as a plan holds its tensors, which end with the session
        self._plans: weakref.WeakKeyDictionary[object, dict[frozenset[str], _Kept]] = weakref.WeakKeyDictionary()
        self._held: dict[str, object] = {}  # (owner, share kept) by name; a name that is absent holds the original

    def restore(self) -> None:
        """Hold the originals."""
        self.load(None, {}, "none", 0.0)

    def forget_plans(self) -> None:
        """Hold no original any longer, nor what was tuned: merges are listed anew."""
        self._plans.clear()

    def expect_writes(self, names: Iterable[str]) -> None:
        """Another is about to write these weights: what they hold is not known until they are loaded again."""
        self._held.update(dict.fromkeys(names, UNKNOWN))
        self.version += 1

    def load(self, owner: object, tuned: Mapping[str, Tensor], strategy: str, keep: float) -> bool:
        """Hold keep * tuned + (1 - keep) * original where the strategy matches, tuned elsewhere (METHOD section 4).

        owner: whose weights these are; equal for equal weights, such as a weak reference to their session, with which
            the merge is kept for the next time
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
            side = tuned if share else self._original
            if self._elsewhere(names, side):
                self._write_singly(names, side, share)
            else:
                of = self if share == 0 else owner() if isinstance(owner, weakref.ref) else None
                self._plan(of, names, side).run(share)
        self._held = wanted
        return True

    def _elsewhere(self, names: Iterable[str], tuned: Mapping[str, Tensor]) -> bool:
        """Whether something of either side would have to come from another device."""
        sides = (self._original, tuned)
        return any(side[name].device != self._resident[name].device for name in names for side in sides)

    def _write_singly(self, names: Iterable[str], tuned: Mapping[str, Tensor], share: float) -> None:
        """The merge, weight by weight, so that of what comes from another device only one is here at a time."""
        for name in names:
            out = self._resident[name]
            weight = tuned[name].to(out.device)
            if 0 < share < 1:
                merge_weights([self._original[name].to(out.device)], [weight], share, [out], backend=self._backend)
            else:
                out.copy_(weight)

    def _plan(self, of: object | None, names: Sequence[str], tuned: Mapping[str, Tensor]) -> MergePlan:
        """The merge of these weights: the one listed before, if that is still true.

        of: with what it is kept; None where there is nothing
        """
        plans = {} if of is None else self._plans.setdefault(of, {})
        key = frozenset(names)
        kept = plans.pop(key, None)
        if kept is None or not kept.is_of(tuned):
            sides = ([side[name] for name in names] for side in (self._original, tuned, self._resident))
            plan = MergePlan(*sides, backend=self._backend)
            kept = _Kept(self._original, names, plan, [weight.data_ptr() for weight in plan.tuned])
        if len(plans) == MOST_PLANS:
            del plans[next(iter(plans))]  # the one not used longest
        plans[key] = kept
        return kept.plan


def lay_out(
    unet: Any,
    dtype: torch.dtype,
    original: Mapping[str, Tensor],
    backend: str,
    device: torch.device | None = None,
) -> tuple[FusedUNet, ResidentWeights]:
    """The engine's UNet of one dtype, holding the originals, and what writes its weights.

    unet: diffusers', holding the originals too; original: by name, prefixed 'unet.'; backend: of forgedit_kernels
    device: None takes the unet's
    """
    fused = FusedUNet(unet, dtype, backend, device)
    named = {f"unet.{name}": weight for name, weight in fused.weights.items()}
    return fused, ResidentWeights(named, original, backend)
