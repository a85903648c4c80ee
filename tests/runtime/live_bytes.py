"""How many bytes of tensors live at once while something runs, on any device, the one without memory among them."""

from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The largest sum of bytes, after any operation, of the storages made inside that are still alive."""

    def __init__(self, known):
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._made.values()))
        return out


def measured(module, *inputs, call=None):
    """Of module(*inputs), or call(*inputs), beyond the module's weights and the inputs."""
    with torch.no_grad(), _no_scores(inputs[0]), LiveBytes([*module.parameters(), *module.buffers(), *inputs]) as live:
        (call or module)(*inputs)
    return live.peak


def _no_scores(like):
    """On the meta device torch computes attention by way of all scores, as no real backend in use does."""
    if not like.is_meta:
        return nullcontext()
    return patch.object(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **options: torch.empty_like(q)
    )
