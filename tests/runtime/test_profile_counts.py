"""What is counted of ops: torch's own by a Counter, native ones by what they tell the trace."""

from functools import partial

import pytest
import torch
from torch.nn.functional import conv2d, embedding, linear, scaled_dot_product_attention

from forgedit.profile.counts import Counter
from forgedit.profile.roofline import Roofline
from forgedit.profile.trace import read_phases, recording
from forgedit.progress import phase
from forgedit_kernels import Adam8bitPlan, AdamPlan, attention, group_norm_silu, merge_weights, norm_geglu
from forgedit_kernels.dispatch import RANGE, native_module
from forgedit_kernels.native_work import WORK

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(native_module() is None, reason="the native module was not built")


def counted(call):
    with Counter() as counter:
        call()
    return counter.phases[""]


Q = torch.ones(2, 3, 8, 16)
COUNTS = {  # call, op, FLOPs, bytes, both by hand
    "convolution": (
        lambda: conv2d(torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3), torch.ones(5), padding=1),
        "aten::convolution",
        2 * (2 * 5 * 8 * 8) * (3 * 3 * 3),
        4 * (2 * 3 * 64 + 5 * 27 + 5 + 2 * 5 * 64),
    ),
    "linear": (
        lambda: linear(torch.ones(7, 11), torch.ones(13, 11), torch.ones(13)),
        "aten::addmm",
        2 * 7 * 11 * 13,
        4 * (7 * 11 + 11 * 13 + 13 + 7 * 13),
    ),
    "attention": (  # once the products with the keys, once with the values; the log-sum-exp is a result too
        lambda: scaled_dot_product_attention(Q, torch.ones(2, 3, 5, 16), torch.ones(2, 3, 5, 16)),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        2 * 2 * (2 * 3 * 8 * 5 * 16),
        4 * (2 * Q.numel() + 2 * 2 * 3 * 5 * 16 + 2 * 3 * 8),
    ),
    "half the bytes": (lambda: torch.ones(6, dtype=torch.bfloat16).exp(), "aten::exp", None, 2 * (6 + 6)),
    "one tensor twice": (lambda: Q * Q, "aten::mul", None, 4 * (Q.numel() + Q.numel())),
    "expanded": (lambda: torch.ones(1, 9).expand(4, 9) + 1, "aten::add", None, 4 * (9 + 36)),
    "in place": (lambda: torch.ones(9).add_(torch.ones(9)), "aten::add_", None, 4 * (9 + 9 + 9)),
    "written unread": (lambda: torch.ones(9).copy_(torch.ones(9)), "aten::copy_", None, 4 * (9 + 9)),
    "into out": (lambda: torch.exp(torch.ones(9), out=torch.empty(9)), "aten::exp", None, 4 * (9 + 9)),
    "a view": (lambda: Q.transpose(1, 2), "aten::transpose", None, 0),
    "an allocation": (lambda: torch.empty(99), "aten::empty", None, 0),
    "few rows of many": (
        lambda: embedding(torch.zeros(2, dtype=torch.long), torch.ones(1000, 8)),
        "aten::embedding",
        None,
        4 * (2 * 8 + 2 * 8) + 8 * 2,
    ),
}


@pytest.mark.parametrize("case", COUNTS, ids=str)
def test_flops_and_bytes_of_one_op(case):
    call, op, flops, num_bytes = COUNTS[case]
    (count,) = [count for (name, _), count in counted(call).items() if name == op]
    assert (count.calls, count.flops, count.num_bytes) == (1, flops, num_bytes)


def test_a_backward_pass_is_counted():
    x, weight = torch.ones(7, 11, requires_grad=True), torch.ones(13, 11, requires_grad=True)
    counts = counted(lambda: linear(x, weight).sum().backward())
    assert sum(count.flops or 0 for count in counts.values()) == 3 * (2 * 7 * 11 * 13)  # forward, and both gradients


def test_the_unets_flops_by_an_independent_count(editor):
    """Each layer's own hook multiplies its sizes."""
    unet, layers = editor.model.unet, []

    def hook(layer, inputs, out):
        if isinstance(layer, torch.nn.Conv2d):
            layers.append(2 * out.numel() * layer.weight[0].numel())
        elif isinstance(layer, torch.nn.Linear):
            layers.append(2 * out.numel() * layer.in_features)

    handles = [module.register_forward_hook(hook) for module in unet.modules()]
    with torch.no_grad():
        counts = counted(lambda: unet(torch.zeros(2, 4, 8, 8), 10, torch.zeros(2, 77, 32), return_dict=False))
    for handle in handles:
        handle.remove()
    ours = {"aten::convolution", "aten::addmm", "aten::mm"}
    assert layers and sum(count.flops for (name, _), count in counts.items() if name in ours) == sum(layers)


def test_the_floor_is_the_slower_of_both():
    roof = Roofline(peak={"float32": 100.0, "bfloat16": 200.0}, bandwidth=10.0)
    assert roof.floor_seconds(1000, 10, "float32") == 10
    assert roof.floor_seconds(1000, 10, "bfloat16") == 5
    assert roof.floor_seconds(1000, 900, "float32") == 90
    assert roof.floor_seconds(None, 5, "none") == 0.5


# native ops


def told(call):
    """What the native ops of a call say they do, by op."""
    with recording(CPU) as export, phase("sample"):
        call()
    (one,) = read_phases(export())
    return {span.name.removeprefix(RANGE): span.work for span in one.walk() if span.work is not None}


def tensors(*shapes, grad=False, dtype=torch.float32):
    return [torch.ones(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def attend(q, k, v, backend, wanted=(True, True, True)):
    q, k, v = (x.detach().requires_grad_(w) for x, w in zip((q, k, v), wanted, strict=True))
    attention(q, k, v, backend=backend).sum().backward()


def learn_gate(dtype, backend):
    x, w, b, weight = tensors((7, 16), (16,), (16,), (24, 16), grad=True, dtype=dtype)
    norm_geglu(x, w, b, weight, None, backend=backend).sum().backward()


def normalise(shift, grad, backend):
    x, w, b = tensors((2, 8, 3, 5), (8,), (8,), grad=grad)
    y = group_norm_silu(x.to(memory_format=torch.channels_last), w, b, 4, shift=shift, backend=backend)
    if grad:
        y.sum().backward()


def step(plan, gradient, copy, backend):
    params, copies = tensors((300,), (5, 4)), tensors((300,), (5, 4), dtype=copy) if copy else None
    plan(params, tensors((300,), (5, 4), dtype=gradient), lr=1e-3, copies=copies, backend=backend).run()


HEADS = tensors((2, 9, 3, 16), (2, 5, 3, 16), (2, 5, 3, 16))
PROMPT = [x[:1].expand(2, -1, -1, -1) for x in HEADS[1:]]
PRODUCT = 2 * (2 * 3 * 9 * 5 * 16)  # operations of any one of attention's
Q_BYTES, K_BYTES, STATS = 4 * 2 * 9 * 3 * 16, 4 * 2 * 5 * 3 * 16, 4 * 2 * 3 * 2 * 9
# A call with a backend; by native op FLOPs and bytes, both by hand; FLOPs that torch's path does not count: the scores
# are made again for the gradients.
NATIVE = {
    "attention": (partial(attention, *HEADS), {"attention": (2 * PRODUCT, 2 * Q_BYTES + 2 * K_BYTES)}, 0),
    "attention to one prompt": (
        partial(attention, HEADS[0], *PROMPT),
        {"attention": (2 * PRODUCT, 2 * Q_BYTES + K_BYTES)},
        0,
    ),
    "attention, learning": (
        partial(attend, *HEADS),
        {
            "attention": (2 * PRODUCT, 2 * Q_BYTES + 2 * K_BYTES + STATS),
            "attention_backward": (5 * PRODUCT, 3 * Q_BYTES + 4 * K_BYTES + STATS),
        },
        PRODUCT,
    ),
    "attention, learning queries": (
        partial(attend, *HEADS, wanted=(True, False, False)),
        {
            "attention": (2 * PRODUCT, 2 * Q_BYTES + 2 * K_BYTES + STATS),
            "attention_backward": (3 * PRODUCT, 3 * Q_BYTES + 2 * K_BYTES + STATS),
        },
        PRODUCT,
    ),
    "gate": (
        partial(learn_gate, torch.float32),
        {"geglu": (None, 4 * 7 * (24 + 12)), "geglu_backward": (None, 4 * 7 * (24 + 12 + 24))},
        0,
    ),
    "gate in half the bytes": (
        partial(learn_gate, torch.bfloat16),
        {"geglu": (None, 2 * 7 * (24 + 12)), "geglu_backward": (None, 2 * 7 * (24 + 12 + 24))},
        0,
    ),
    "norm": (partial(normalise, None, False), {"group_norm_silu": (None, 4 * (2 * 240 + 2 * 8))}, 0),
    "norm with one shift, learning": (
        partial(normalise, torch.ones(1, 8), True),
        {
            "group_norm_silu": (None, 4 * (2 * 240 + 3 * 8 + 2 * 2 * 4)),
            "group_norm_silu_backward": (None, 4 * (3 * 240 + 5 * 8 + 2 * 8 + 2 * 2 * 4)),
        },
        0,
    ),
    "merge": (
        lambda backend: merge_weights(tensors((6,), (4, 2)), tensors((6,), (4, 2)), 0.5, backend=backend),
        {"merge_weights": (None, 3 * 4 * (6 + 8))},
        0,
    ),
    "Adam": (partial(step, AdamPlan, torch.float32, None), {"adam": (None, 28 * 320)}, 0),
    "Adam with copies": (partial(step, AdamPlan, torch.bfloat16, torch.bfloat16), {"adam": (None, 28 * 320)}, 0),
}


@needs_native
def test_every_native_op_tells_its_work():
    assert WORK.keys() == vars(native_module()).keys() - {"instruction_sets"}


@needs_native
@pytest.mark.parametrize("case", NATIVE)
def test_the_work_of_native_ops(case):
    """By hand, and with what is left to torch as much as torch counts where the reference does it all."""
    call, expected, again = NATIVE[case]
    works = told(lambda: call(backend="native"))
    assert {op: (work.flops, work.num_bytes) for op, work in works.items()} == expected
    in_torch, reference = (
        sum(count.flops or 0 for count in counted(lambda backend=backend: call(backend=backend)).values())
        for backend in ("native", "reference")
    )
    assert in_torch + sum(work.flops or 0 for work in works.values()) == reference + again


@needs_native
def test_attention_counts_as_torchs_own():
    """torch's attention too makes the scores again."""
    works = told(lambda: attend(*HEADS, "native"))
    counts = counted(lambda: attend(*HEADS, "sdpa"))
    assert sum(work.flops for work in works.values()) == sum(count.flops or 0 for count in counts.values())


@needs_native
def test_8_bit_moments_move_a_byte_and_a_share_of_the_scales():
    params, gradients = tensors((5000,)), tensors((5000,), dtype=torch.bfloat16)
    plan = Adam8bitPlan(params, gradients, lr=1e-3, copies=tensors((5000,), dtype=torch.bfloat16), backend="native")
    work = told(plan.run)["adam8bit"]
    # param in and out, gradient, copy, codes of both moments in and out; two scales a block of 256, in and out
    assert (work.flops, work.num_bytes) == (None, 5000 * (8 + 2 + 2 + 4) + 20 * 2 * 8)
    assert (work.dtype, work.shapes) == ("float32", ((5000,),))
