"""Ops against their baselines, in one run: `python -m bench.ops [--threads 1 2]`.

merge_weights: our native module and our reference against torch's `_foreach` functions, all writing given tensors.
group_norm_silu training: forward pass and all gradients, against torch's own ops on the same channels-last data.
"""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import group_norm, silu

from bench.measure import Row, append, check, time_calls
from bench.program import plain_parser
from forgedit_kernels import available_backends, group_norm_silu, merge_weights, merge_weights_reference

CPU = torch.device("cpu")
KEEP = 0.3
CROSS_DOWN, CROSS_UP = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
UNETS = {
    # Stable Diffusion 1.4's own shapes; the learned encoder weights, as `noencoder` merges them
    "sd14-encoder": {"sample_size": 64, "cross_attention_dim": 768},
    # a small UNet of the same blocks, the size of the bundled one: many tensors, few elements each
    "small-unet-encoder": {"sample_size": 16, "cross_attention_dim": 128, "block_out_channels": (64, 96, 128, 128)},
}

# Maps of the bundled UNet for a 64x64 photo, 10 at once as tuning has them: side, channels
NORMS = ((16, 64), (16, 160), (8, 96), (4, 128), (4, 288), (2, 160), (2, 320))

Tensors = list[torch.Tensor]


def encoder_shapes(config: dict[str, object]) -> list[torch.Size]:
    """Shapes of the trainable encoder parameters (METHOD item 5) of a UNet with SD's blocks."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            **config,
            down_block_types=(*CROSS_DOWN, "DownBlock2D"),
            up_block_types=("UpBlock2D", *CROSS_UP),
        )
    names = unet.named_parameters()
    return [w.shape for name, w in names if "down_blocks" in name and "down_blocks.0" not in name]


def merge_backends(original: Tensors, tuned: Tensors, out: Tensors) -> dict[str, Callable[[], Tensors]]:
    """Each backend's merge, into `out` where it does not say otherwise; returns the merged tensors, can be repeated."""

    def foreach_mul_add() -> Tensors:
        torch._foreach_copy_(out, tuned)
        torch._foreach_mul_(out, KEEP)
        torch._foreach_add_(out, original, alpha=1 - KEEP)
        return out

    def foreach_lerp() -> Tensors:
        torch._foreach_copy_(out, original)
        torch._foreach_lerp_(out, tuned, KEEP)
        return out

    def ours(backend: str) -> Callable[[], Tensors]:
        return lambda: merge_weights(original, tuned, KEEP, out, backend=backend)

    return {
        **{backend: ours(backend) for backend in available_backends(CPU)},
        "torch._foreach mul, add": foreach_mul_add,
        "torch._foreach lerp": foreach_lerp,
        "torch._foreach lerp, new tensors": lambda: list(torch._foreach_lerp(original, tuned, KEEP)),
    }


def merge_error(original: Tensors, tuned: Tensors, merged: Tensors, keep: float = KEEP) -> float:
    """The largest error of `merged` against float64; not a number if a tensor holds one."""
    errors = []
    for w_original, w_tuned, w in zip(original, tuned, merged, strict=True):
        truth = torch.empty_like(w, dtype=torch.float64)
        merge_weights_reference([w_original.double()], [w_tuned.double()], keep, [truth])
        errors.append(truth.sub_(w).abs_().max())
    return torch.stack(errors).max().item()  # torch's maximum keeps a NaN, Python's may drop it


def allowed_merge_error(original: Tensors, tuned: Tensors, keep: float = KEEP) -> float:
    """Twice the reference's own error, plus half a unit of the largest weight."""
    merged = [torch.empty_like(w) for w in tuned]
    merge_weights_reference(original, tuned, keep, merged)
    scale = max(float(w.abs().max()) for w in merged)
    return 2 * merge_error(original, tuned, merged, keep) + torch.finfo(merged[0].dtype).eps / 2 * scale


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of torch's own copy of 512 MiB at the present thread count: the roofline."""
    source = torch.ones(2**27)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_calls(lambda: target.copy_(source), CPU, calls=5).p50_s


def bench_merge_weights(threads: int, bandwidth: float) -> None:
    for case, config in UNETS.items():
        shapes = encoder_shapes(config)
        full_size = case.startswith("sd14")
        for dtype in (torch.float32,) if full_size else (torch.float32, torch.bfloat16, torch.float16):
            generator = torch.Generator().manual_seed(0)
            original = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
            tuned = [w + 0.1 * w.flip(0) for w in original]
            out = [torch.empty_like(w) for w in original]
            allowed = allowed_merge_error(original, tuned)
            least_bytes = 3 * sum(w.nbytes for w in out)
            for backend, call in merge_backends(original, tuned, out).items():
                torch._foreach_mul_(out, float("nan"))
                error = check(f"merge_weights {backend}", merge_error(original, tuned, call()), allowed)
                timing = time_calls(call, CPU, warmup=1, calls=5 if full_size else 50)
                share = least_bytes / timing.p50_s / bandwidth
                row = Row("merge_weights", case, backend, str(dtype)[6:], timing, error, share)
                append("ops", row, CPU)
                milliseconds = f"{timing.p50_s * 1e3:9.3f} ms, {share:.2f} of a copy's bandwidth"
                print(f"{case:20} {row.dtype:9} threads {threads} {backend:34} {milliseconds}", flush=True)


def torch_group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, *, shift: torch.Tensor
) -> torch.Tensor:
    """The baseline; the gradients of all tensors are asked for, as torch's backward dies on some subsets of them."""
    return silu(group_norm(x + shift[:, :, None, None], groups, weight, bias))


def train_norm(op: Callable[..., torch.Tensor], tensors: Tensors, groups: int = 16) -> Tensors:
    """The output and the gradients of x, weight, bias and shift; tensors: these, then the output's gradient."""
    own = [tensor.detach().requires_grad_() for tensor in tensors[:4]]
    y = op(*own[:3], groups, shift=own[3])
    return [y.detach(), *torch.autograd.grad(y, own, tensors[4])]


def bench_group_norm_silu(threads: int, bandwidth: float) -> None:
    backends = {b: partial(group_norm_silu, backend=b) for b in available_backends(CPU)}
    backends["torch group_norm, silu"] = torch_group_norm_silu
    for side, channels in NORMS:
        generator = torch.Generator().manual_seed(0)
        shapes = [(10, channels, side, side), (channels,), (channels,), (10, channels), (10, channels, side, side)]
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        tensors = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in tensors]
        truth = train_norm(backends["reference"], [x.double() for x in tensors])
        scale = max(float(x.abs().max()) for x in truth)

        def error(got: Tensors, truth: Tensors = truth) -> float:
            return torch.stack([(x - y).abs().max() for x, y in zip(got, truth, strict=True)]).max().item()

        allowed = 2 * error(train_norm(backends["reference"], tensors)) + 2**-22 * scale
        for backend, op in backends.items():
            call = partial(train_norm, op, tensors)
            worst = check(f"group_norm_silu training {backend}", error(call()), allowed)
            timing = time_calls(call, CPU, warmup=3, calls=50)
            share = 5 * tensors[0].nbytes / timing.p50_s / bandwidth  # read x, write y; read x and dy, write dx
            case = f"{side}x{side}x{channels} batch 10"
            append("ops", Row("group_norm_silu training", case, backend, "float32", timing, worst, share), CPU)
            print(f"{case:20} float32   threads {threads} {backend:34} {timing.p50_s * 1e3:9.3f} ms", flush=True)


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts to measure (default 1 2)")
    for threads in parser.parse_args().threads:
        torch.set_num_threads(threads)
        bandwidth = copy_bandwidth()
        bench_merge_weights(threads, bandwidth)
        bench_group_norm_silu(threads, bandwidth)


if __name__ == "__main__":
    main()
