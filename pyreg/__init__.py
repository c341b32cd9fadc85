"""Fused operators for the regularizers that deep-learning papers propose, as drop-in PyTorch functions."""

from pyreg import diagnostics, functional, nn, optim, transport
from pyreg.companding import compand, decompand

__all__ = ["compand", "decompand", "diagnostics", "functional", "nn", "optim", "transport"]
__version__ = "0.1.0"
