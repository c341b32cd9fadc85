"""Comparisons that every operator's tests share.

An operator's result is held against the same formula in float64 on the same (already rounded) inputs, and may be wrong
by at most twice what plain PyTorch in the operator's own dtype is wrong by, plus a floor of a few roundings for the
cases where plain PyTorch happens to be exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Unit roundoff of each dtype: half the distance from 1 to the next number.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLOAT_DTYPES = tuple(ROUNDOFF)


def relative_error(actual: Tensor, expected: Tensor, noise: float = 0.0) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, in float64; NaN and infinity must agree in place.

    ``noise`` is the absolute error an element of ``expected`` may carry itself; it is taken off the difference.
    """
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    special = ~expected.isfinite()
    torch.testing.assert_close(actual[special], expected[special], equal_nan=True)
    assert actual[~special].isfinite().all(), "not finite where it should be"
    difference = ((actual[~special] - expected[~special]).abs() - noise).clamp_min(0).norm()
    return (difference / expected[~special].norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def assert_as_accurate(actual: Tensor, plain: Tensor, truth: Tensor, *, floor: float = 2.0) -> None:
    """error(actual) <= 2 error(plain) + floor roundoffs of actual's dtype.

    The truth is float64's and no better: its elements carry an absolute error of a few roundoffs of the O(1) numbers
    they were computed from, and a float64 result may differ from it by what sums of thousands of terms lose.
    """
    noise = 16 * ROUNDOFF[torch.float64]
    error, plain_error = relative_error(actual, truth, noise), relative_error(plain, truth, noise)
    limit = 2 * plain_error + (64 if actual.dtype == torch.float64 else floor) * ROUNDOFF[actual.dtype]
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.2e} (plain PyTorch {plain_error:.2e})"


def assert_runs_without_waiting_and_in_a_graph(step: Callable[[], list[Tensor]]) -> None:
    """A step on a GPU never waits for it, and a CUDA graph that has captured it gives the same bits."""
    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.fill_(math.nan)
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
