"""The blends of a sweep against the reference in float64, and against the stage that blends one edit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forgedit.config import EditConfig
from forgedit.stages import blend as stage
from forgedit_kernels.blend_embeddings import blend_embeddings, blend_embeddings_reference
from tests.kernels.checks import largest_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest truth. float32: four roundings of half a unit in the last place; 16-bit types: the last one,
# and the interpreter truncates to bfloat16, which may cost a whole unit.
FLOORS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
SHAPES = {"one": (1, 1), "odd": (5, 7), "bundled-width": (11, 128), "sd1-width": (3, 768), "sd2-width": (2, 1024)}
CONFIGS = [
    EditConfig(blend="vs", gamma=0.8),
    EditConfig(blend="vs", gamma=1.4),
    EditConfig(blend="vp", identity_weight=0.9, edit_weight=1.3),
    EditConfig(blend="vp", identity_weight=1.0, edit_weight=1.7),
]
WEIGHTS = torch.tensor([[0.2, 0.8, 0], [-0.4, 1.4, 0], [0.9, 1.3, 1], [1.0, 1.7, 1]])  # CONFIGS, as rows


def _embeddings(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Source and target with much in common and a mean of their own, as a text encoder's have."""
    generator = torch.Generator().manual_seed(0)
    common = 0.5 + torch.randn((1, tokens, width), generator=generator)
    source, target = (common + 0.5 * torch.randn((1, tokens, width), generator=generator) for _ in range(2))
    return source.to(dtype), target.to(dtype)


def _poisoned(source: Tensor, weights: Tensor) -> Tensor:
    return source.new_full((len(weights), *source.shape[1:]), float("nan"))


def _check(got: Tensor, source: Tensor, target: Tensor, weights: Tensor) -> bool:
    """STYLE's rule: at most twice the reference's own error in that dtype, plus the dtype's floor."""
    truth, reference = _poisoned(source.double(), weights), _poisoned(source, weights)
    blend_embeddings_reference(source.double(), target.double(), weights.double(), truth)
    blend_embeddings_reference(source, target, weights, reference)
    return largest_error(got, truth) <= 2 * largest_error(reference, truth) + FLOORS[got.dtype] * float(
        truth.abs().max()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_triton_is_within_the_error_rule(case: str, dtype: torch.dtype) -> None:
    source, target = _embeddings(*SHAPES[case], dtype)
    for weights in (WEIGHTS, WEIGHTS[2:3]):
        out = _poisoned(source, weights)
        assert blend_embeddings(source, target, weights, out=out, backend="triton") is out
        assert _check(out, source, target, weights)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_numbers_are_the_stages(backend: str) -> None:
    source, target = _embeddings(13, 128, torch.float32)
    got = blend_embeddings(source, target, WEIGHTS, backend=backend)
    for config, blended in zip(CONFIGS, got, strict=True):
        truth = stage.blend_embeddings(source.double(), target.double(), config)[0]
        own_error = largest_error(stage.blend_embeddings(source, target, config)[0], truth)
        assert largest_error(blended, truth) <= 2 * own_error + FLOORS[torch.float32] * float(truth.abs().max()), config
    exact = blend_embeddings(source.double(), target.double(), torch.tensor([[0.9, 1.3, 1]], dtype=torch.float64))
    truth = stage.blend_embeddings(source.double(), target.double(), CONFIGS[2])
    torch.testing.assert_close(exact, truth, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_no_length_keep_the_target(dtype: torch.dtype, backend: str) -> None:
    source, target = _embeddings(4, 9, dtype)
    source[0, 1] = 0
    source[0, 2] *= 1e-7  # float16's subnormals, which have a direction all the same
    got = blend_embeddings(source, target, WEIGHTS, backend=backend)
    assert _check(got, source, target, WEIGHTS)
    assert largest_error(got[2, 1], 1.3 * target[0, 1].double()) <= FLOORS[dtype] * 8


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_token_shorter_than_1e_12_counts_as_that_long(backend: str) -> None:
    source, target = _embeddings(1, 16, torch.float32)
    source *= 1e-14  # so u is about 0.05 long, and a 400th of the projection is taken off
    got = blend_embeddings(source, target, WEIGHTS, backend=backend)
    assert _check(got, source, target, WEIGHTS)
    clamped = stage.blend_embeddings(source.double(), target.double(), CONFIGS[2])
    assert largest_error(got[2:3], clamped) <= FLOORS[torch.float32] * float(clamped.abs().max())
    whole = stage.blend_embeddings(source.double() * 1e14, target.double(), EditConfig(blend="vp", identity_weight=0.0))
    assert largest_error((clamped / 1.3).float(), whole) > 0.1, "the inputs tell the two apart"


def test_a_blend_is_the_same_in_any_sweep() -> None:
    source, target = _embeddings(7, 128, torch.float32)
    together = blend_embeddings(source, target, WEIGHTS, backend="triton")
    for k in (3, 0, 2):
        assert torch.equal(blend_embeddings(source, target, WEIGHTS[k : k + 1], backend="triton")[0], together[k])


def _blends(source: Tensor, target: Tensor, weights: Tensor, projection: Tensor) -> Tensor:
    of_source, of_edit, of_projection = weights[:, :, None, None].unbind(dim=1)
    return of_source * source + of_edit * (target - of_projection * projection)


def _right(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    unit = source / source.norm(dim=-1, keepdim=True)
    return _blends(source, target, weights, (target * unit).sum(dim=-1, keepdim=True) * unit)


def _projection_on_the_target(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    unit = target / target.norm(dim=-1, keepdim=True)
    return _blends(source, target, weights, (source * unit).sum(dim=-1, keepdim=True) * unit)


def _projection_over_all_tokens(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    unit = source / source.norm()
    return _blends(source, target, weights, (target * unit).sum() * unit)


def _source_not_normalised(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return _blends(source, target, weights, (target * source).sum(dim=-1, keepdim=True) * source)


def _projection_always_taken_off(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return _right(source, target, torch.cat([weights[:, :2], torch.ones(len(weights), 1)], dim=1))


def _swapped_weights(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return _right(source, target, weights[:, [1, 0, 2]])


def _weights_in_bfloat16(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return _right(source, target, weights.bfloat16().float())


def _last_blend_for_all(source: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return _right(source, target, weights[-1:].expand(len(weights), -1))


@pytest.mark.parametrize(
    "wrong",
    [
        _projection_on_the_target, _projection_over_all_tokens, _source_not_normalised, _projection_always_taken_off,
        _swapped_weights, _weights_in_bfloat16, _last_blend_for_all,
    ],
)  # fmt: skip
def test_a_wrong_blend_is_rejected(wrong: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    source, target = _embeddings(7, 33, torch.float32)
    assert _check(_right(source, target, WEIGHTS), source, target, WEIGHTS), "written as the wrong ones are, but right"
    assert not _check(wrong(source, target, WEIGHTS), source, target, WEIGHTS)


def test_no_gradients_no_blends_and_float64() -> None:
    source, target = _embeddings(3, 5, torch.float32)
    assert not blend_embeddings(source.requires_grad_(), target, WEIGHTS).requires_grad
    assert blend_embeddings(source, target, WEIGHTS[:0], backend="triton").shape == (0, 3, 5)
    with pytest.raises(RuntimeError, match=r"got torch\.float64"):
        blend_embeddings(source.double(), target.double(), WEIGHTS, backend="triton")
    with pytest.raises(RuntimeError, match=r"got weights of torch\.float64"):
        blend_embeddings(source, target, WEIGHTS.double(), backend="triton")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source": torch.ones(2, 3, 5)}, r"source must be floating point \[1, T, D\], got torch.float32 \[2, 3, 5\]"),
        ({"source": torch.ones(1, 3, 5).int()}, r"source must be floating point"),
        ({"target": torch.ones(1, 4, 5)}, r"target must be torch.float32 \[1, 3, 5\], got torch.float32 \[1, 4, 5\]"),
        ({"target": torch.ones(1, 3, 5).half()}, r"target must be torch.float32 \[1, 3, 5\], got torch.float16"),
        ({"target": torch.ones(1, 5, 3).mT}, "target must be contiguous"),
        ({"target": torch.ones(1, 3, 5, device="meta")}, "target must be on cpu, as source, got meta"),
        ({"weights": torch.ones(2, 2)}, r"weights must be float32 \[K, 3\], got torch.float32 \[2, 2\]"),
        ({"weights": torch.ones(2, 3).half()}, r"weights must be float32 \[K, 3\], got torch.float16"),
        ({"weights": torch.ones(3, 2).T}, "weights must be contiguous"),
        ({"out": torch.ones(1, 3, 5)}, r"out must be torch.float32 \[2, 3, 5\]"),
        ({"backend": "native"}, "unknown backend 'native' for blend_embeddings"),
    ],
)
def test_wrong_arguments(changed: dict[str, object], message: str) -> None:
    inputs = {"source": torch.ones(1, 3, 5), "target": torch.ones(1, 3, 5), "weights": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=message):
        blend_embeddings(**inputs | changed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [128, 768, 1024])
def test_triton_on_cuda(width: int, dtype: torch.dtype) -> None:
    source, target = _embeddings(77, width, dtype)
    weights = WEIGHTS.repeat(5, 1)
    out = _poisoned(source, weights).cuda()
    blend_embeddings(source.cuda(), target.cuda(), weights.cuda(), out=out, backend="triton")
    assert _check(out, source, target, weights)
