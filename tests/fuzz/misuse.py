"""The property: whatever an argument is, there is a result, or an error that names the operator."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st

_Z = torch.complex64

# By name, so that a failing example can be read.
JUNK: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "3": 3,
    "-0.5": -0.5,
    "0.5": 0.5,
    "1e-320": 1e-320,
    "1e300": 1e300,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "1j": 1j,
    "'x'": "x",
    "()": (),
    "[1.0]": [1.0],
    "{}": {},
    "tensor(1.)": torch.tensor(1.0),
    "tensor(nan)": torch.tensor(math.nan),
    "tensor(1)": torch.tensor(1),
    "tensor([2.])": torch.tensor([2.0]),
    "tensor([[1.]])": torch.tensor([[1.0]]),
    "tensor([])": torch.zeros(0),
    "zeros(0, 3)": torch.zeros(0, 3),
    "zeros(3, 0)": torch.zeros(3, 0),
    "ones(4, 3)": torch.ones(4, 3),
    "ones(4, 3) in float64": torch.ones(4, 3, dtype=torch.float64),
    "ones(4, 3) in int32": torch.ones(4, 3, dtype=torch.int32),
    "ones(4, 3) in bool": torch.ones(4, 3, dtype=torch.bool),
    "ones(4, 3) in complex": torch.ones(4, 3, dtype=_Z),
    "ones(4) on meta": torch.ones(4, device="meta"),
    "ones(4)": torch.ones(4),
    "ones(3)": torch.ones(3),
    "arange(4)": torch.arange(4),
    "arange(4) as int32": torch.arange(4, dtype=torch.int32),
    "-arange(4)": -torch.arange(4),
    "2^62": torch.full((4,), 2**62),
    "sparse": torch.ones(4, 3).to_sparse(),
    "trained ones(4)": torch.ones(4, requires_grad=True),
    "float8": torch.ones(4, 3).to(torch.float8_e4m3fn),
}


def junk() -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(JUNK))


def assert_result_or_named_error(
    operator: str, function: Callable[..., Any], arguments: Mapping[str, Any], changes: Mapping[str, str]
) -> None:
    """``arguments`` with some replaced by JUNK."""
    given = {**arguments, **{name: JUNK[value] for name, value in changes.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(**given)
            return
        except (ValueError, TypeError, IndexError) as named:
            error = named
    assert operator in str(error), f"an error that does not name {operator}: {type(error).__name__}: {error}"
