"""Operators as functions, named as in :mod:`torch.nn.functional`."""

from pyreg.ops.stablemax import (
    log_stablemax,
    stablemax,
    stablemax_cross_entropy,
    stablemax_cross_entropy_,
)

__all__ = [
    "log_stablemax",
    "stablemax",
    "stablemax_cross_entropy",
    "stablemax_cross_entropy_",
]
