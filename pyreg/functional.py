"""Operators as functions, named as in :mod:`torch.nn.functional`."""

from pyreg.ops.linear_stablemax import linear_stablemax_cross_entropy
from pyreg.ops.stablemax import (
    log_stablemax,
    stablemax,
    stablemax_cross_entropy,
    stablemax_cross_entropy_,
)
from pyreg.ops.weight_compander import weight_compander, weight_compander_inverse

__all__ = [
    "linear_stablemax_cross_entropy",
    "log_stablemax",
    "stablemax",
    "stablemax_cross_entropy",
    "stablemax_cross_entropy_",
    "weight_compander",
    "weight_compander_inverse",
]
