"""Fused operators for the regularizers that deep-learning papers propose, as drop-in PyTorch functions."""

from typing import TYPE_CHECKING, NoReturn

__version__ = "0.1.0"

from pyreg import _requirements

__all__ = ["compand", "decompand", "diagnostics", "functional", "nn", "optim", "transport"]

if TYPE_CHECKING or _requirements.TORCH_ERROR is None:
    from pyreg import diagnostics, functional, nn, optim, transport
    from pyreg.companding import compand, decompand
else:  # `python -m pyreg.env` imports this file too, and tells what to do

    def __getattr__(name: str) -> NoReturn:
        if name in __all__:
            _requirements.check()
        raise AttributeError(f"module 'pyreg' has no attribute {name!r}")
