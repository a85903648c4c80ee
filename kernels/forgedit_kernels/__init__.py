"""The ops the engine is built from, each with a plain torch reference beside its fast paths."""

from forgedit_kernels.dispatch import available_backends
from forgedit_kernels.merge_weights import merge_weights, merge_weights_reference

__all__ = ["available_backends", "merge_weights", "merge_weights_reference"]
