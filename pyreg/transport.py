"""What the transport functions of :mod:`pyreg.functional` return, and what they warn with."""

from pyreg.ops._convergence import ConvergenceWarning
from pyreg.ops._transport import Transport

__all__ = ["ConvergenceWarning", "Transport"]
