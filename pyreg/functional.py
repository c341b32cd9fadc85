"""Operators as functions, named as in :mod:`torch.nn.functional`."""

from pyreg.ops.conr import conr_loss
from pyreg.ops.info_nce import info_nce
from pyreg.ops.linear_stablemax import linear_stablemax_cross_entropy
from pyreg.ops.monge_gap import monge_gap
from pyreg.ops.partial_transport import progressive_partial_transport, semantic_partial_transport
from pyreg.ops.sinkhorn import sinkhorn, sinkhorn_points
from pyreg.ops.sinkhorn_divergence import sinkhorn_divergence
from pyreg.ops.stablemax import (
    log_stablemax,
    stablemax,
    stablemax_cross_entropy,
    stablemax_cross_entropy_,
)
from pyreg.ops.supcon import supcon_loss
from pyreg.ops.weight_compander import weight_compander, weight_compander_inverse

__all__ = [
    "conr_loss",
    "info_nce",
    "linear_stablemax_cross_entropy",
    "log_stablemax",
    "monge_gap",
    "progressive_partial_transport",
    "semantic_partial_transport",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_points",
    "stablemax",
    "stablemax_cross_entropy",
    "stablemax_cross_entropy_",
    "supcon_loss",
    "weight_compander",
    "weight_compander_inverse",
]
