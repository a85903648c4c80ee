"""The ops the engine is built from, each with a plain torch reference beside its fast paths."""

from forgedit_kernels.adam import AdamPlan
from forgedit_kernels.adam8bit import Adam8bitPlan
from forgedit_kernels.attention import attention
from forgedit_kernels.blend_embeddings import blend_embeddings
from forgedit_kernels.dispatch import available_backends, backend_for
from forgedit_kernels.group_norm_silu import group_norm_silu
from forgedit_kernels.guided_step import guided_step
from forgedit_kernels.merge_weights import MergePlan, merge_weights, merge_weights_reference
from forgedit_kernels.projection import linear_residual, norm_geglu, norm_linear

__all__ = [
    "Adam8bitPlan",
    "AdamPlan",
    "MergePlan",
    "attention",
    "available_backends",
    "backend_for",
    "blend_embeddings",
    "group_norm_silu",
    "guided_step",
    "linear_residual",
    "merge_weights",
    "merge_weights_reference",
    "norm_geglu",
    "norm_linear",
]
