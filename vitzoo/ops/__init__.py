"""Operators: tensors in, tensors out. Each has a plain reference and a choice of backends."""

from vitzoo.ops._dispatch import OPERATORS, Backend, Operator, use_backend
from vitzoo.ops.attention import attention
from vitzoo.ops.attention_weights import attention_weights
from vitzoo.ops.channel import channel_attention
from vitzoo.ops.convolution import convolution
from vitzoo.ops.grouped import grouped_attention
from vitzoo.ops.halo import halo_attention
from vitzoo.ops.linear import linear, linear_choices, linear_gelu, set_linear_choices
from vitzoo.ops.lookup import lookup_gather, lookup_infuse, lookup_similarity
from vitzoo.ops.merge import deformable_merge
from vitzoo.ops.neighborhood import neighborhood_attention
from vitzoo.ops.routed import routed_attention
from vitzoo.ops.topk import topk_mask
from vitzoo.ops.window import window_attention

__all__ = [
    "OPERATORS",
    "Backend",
    "Operator",
    "attention",
    "attention_weights",
    "channel_attention",
    "convolution",
    "deformable_merge",
    "grouped_attention",
    "halo_attention",
    "linear",
    "linear_choices",
    "linear_gelu",
    "lookup_gather",
    "lookup_infuse",
    "lookup_similarity",
    "neighborhood_attention",
    "routed_attention",
    "set_linear_choices",
    "topk_mask",
    "use_backend",
    "window_attention",
]
