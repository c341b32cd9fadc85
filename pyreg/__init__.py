"""Fused operators for the regularizers that deep-learning papers propose, as drop-in PyTorch functions."""

from pyreg import diagnostics, functional, nn

__all__ = ["diagnostics", "functional", "nn"]
__version__ = "0.1.0"
