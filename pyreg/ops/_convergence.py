"""What an iteration says that has ended too early."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


class ConvergenceWarning(UserWarning):
    """An iteration has ended without reaching what was asked of it; the message says what it has reached, and what to
    do."""


def warn(message: str) -> None:
    """A warning at the line that has called pyreg."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)
