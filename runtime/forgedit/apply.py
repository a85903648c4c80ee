"""A session's weights outside its editor: with forgetting, one by one, and written into modules of the caller's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from forgedit.stages.forget import forgotten_names
from forgedit_kernels import merge_weights


def merged_weights(
    tuned: Mapping[str, Tensor], original: Mapping[str, Tensor], strategy: str, keep: float
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tuned weight: keep * tuned + (1 - keep) * original where the strategy matches.

    tuned, original: by name, prefixed 'unet.' or 'text_encoder.'; the UNet's alone are forgotten. Values are made one
    at a time, on the original's device, so that no second set of weights is held.
    Raises: ValueError at once for keep, an unknown strategy, or one that matches no tuned weight of the UNet
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep {keep!r} is out of range; expected 0 to 1")
    forgotten = set(forgotten_names([name for name in tuned if name.startswith("unet.")], strategy))

    def merge() -> Iterator[tuple[str, Tensor]]:
        for name, weight in tuned.items():
            before = original[name]
            weight = weight.to(before.device)
            yield name, merge_weights([before], [weight], keep)[0] if name in forgotten else weight

    return merge()


@torch.no_grad()
def apply_weights(
    parts: Mapping[str, nn.Module],
    tuned: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    strategy: str,
    keep: float,
    check_base: bool,
) -> None:
    """Write the tuned weights into modules, in their dtype, layout and device. What fails a check touches nothing.

    parts: the caller's modules by 'unet' and 'text_encoder'; tuned, original, strategy, keep: as merged_weights takes
    check_base: compare what is not written with the original, rounded to the module's dtype. What is written needs no
        comparison, as nothing of it stays: so another session or strategy may follow on the same module.
    Raises: ValueError, see Session.apply_to
    """
    merged = merged_weights(tuned, original, strategy, keep)
    missing = {name.partition(".")[0] for name in tuned} - parts.keys()
    if missing:
        raise ValueError(f"the session tuned the {', '.join(sorted(missing))} too; give it as well")
    targets: dict[str, Tensor] = {}
    for part, module in parts.items():
        expected = {name: weight for name, weight in original.items() if name.startswith(f"{part}.")}
        targets |= _checked(part, module, expected)
    if check_base:
        for name, target in targets.items():
            if name not in tuned and not torch.equal(target, original[name].to(target.device, target.dtype)):
                raise ValueError(
                    f"{name!r} is not the base model's that the session was tuned on; give that model's modules, or "
                    "check_base=False"
                )
    for name, weight in merged:
        targets[name].copy_(weight)


def _checked(part: str, module: nn.Module, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's weights by prefixed name. Raises: ValueError unless they can take the expected ones' values."""
    weights: dict[str, Tensor] = {f"{part}.{name}": weight for name, weight in module.named_parameters()}
    for names, wrong in ((weights.keys() - expected.keys(), "more"), (expected.keys() - weights.keys(), "fewer")):
        if names:
            raise ValueError(
                f"the {part} has {len(names)} weights {wrong} than the session's, such as {min(names)!r}; expected the "
                "same architecture, with no LoRA or adapter loaded"
            )
    memory = {weight.untyped_storage().data_ptr() for weight in expected.values()}
    for name, weight in weights.items():
        if weight.shape != expected[name].shape or not weight.is_floating_point():
            got, wanted = f"{weight.dtype} {list(weight.shape)}", list(expected[name].shape)
            raise ValueError(f"{name!r} is {got}; expected a float dtype and {wanted}, not quantised")
        if weight.is_meta:
            raise ValueError(f"{name!r} is offloaded; load the {part} without offloading")
        if weight.untyped_storage().data_ptr() in memory:
            raise ValueError(
                f"the {part} shares its weights with the session's editor (Editor.from_pipe), whose originals would be "
                f"written over; give a copy, such as copy.deepcopy(pipe.{part})"
            )
    return weights
