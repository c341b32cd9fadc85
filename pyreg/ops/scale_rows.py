"""A gradient that was formed in the forward pass, times its upstream gradient, in place.

Kernels: ``csrc/scale_rows``.
"""

from __future__ import annotations

from torch import Tensor

from pyreg.ops import _library

_operator = _library.operator("scale_rows_")


def scale_rows_(rows: Tensor, factor: Tensor) -> None:
    """``rows[i] *= factor[i]``; ``rows`` contiguous ``[N, ...]``, ``factor`` ``[N]`` or ``[]``. Free where it is 1."""
    _operator(rows, factor)


@_library.fake("scale_rows_")
def _(rows: Tensor, factor: Tensor) -> None:
    return None
