"""Whether the torch that is here serves pyreg: found out before anything else of the package is imported."""

from __future__ import annotations

import re

OLDEST_TORCH = (2, 10)
REMEDY = f"pip install 'torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}'"


def torch_version() -> str | None:
    """None where torch cannot be imported."""
    try:
        import torch
    except (ImportError, OSError):  # the latter: a library that torch loads is missing
        return None
    return str(torch.__version__)


def _find_torch_error() -> ImportError | None:
    needed = f"pyreg needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            return ImportError(f"{needed}, and the one here lacks the module {error.name}; reinstall it: {REMEDY}")
        return ImportError(f"{needed}, and none is installed; install it: {REMEDY}")
    except (ImportError, OSError) as error:
        return ImportError(f"{needed}, and the one here cannot be imported: {error}; reinstall it: {REMEDY}")
    numbers = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        return ImportError(f"{needed}, found {torch.__version__}; update it: {REMEDY}")
    return None


TORCH_ERROR = _find_torch_error()


def check() -> None:
    """Raises why torch does not serve."""
    if TORCH_ERROR is not None:
        raise ImportError(*TORCH_ERROR.args)
