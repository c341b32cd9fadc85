"""scale_rows_ against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from pyreg.ops.scale_rows import scale_rows_
from tests.oracle import FLOAT_DTYPES


@pytest.mark.parametrize("factor_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (17, 33), (2, 4097), (1, 40_001), (0, 5), (5, 0), (2, 3, 5)])
def test_against_torch(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, factor_dtype: torch.dtype
) -> None:
    rows = torch.randn(shape).to(dtype).to(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # one product, rounded once
    for factor in (torch.randn(shape[0]), torch.tensor(0.3), torch.tensor(1.0), torch.ones(shape[0])):
        factor = factor.to(factor_dtype).to(device)
        spread = factor.reshape(-1, *[1] * (len(shape) - 1)) if factor.dim() else factor
        expected = (rows.to(wide) * spread.to(wide)).to(dtype)
        actual = rows.clone()
        scale_rows_(actual, factor)
        assert torch.equal(actual, expected)


def test_a_factor_of_one_leaves_every_bit(device: torch.device) -> None:
    rows = torch.tensor([[float("nan"), -0.0, 1e-45]], device=device)
    before = rows.view(torch.int32).clone()
    scale_rows_(rows, torch.ones((), device=device))
    assert torch.equal(rows.view(torch.int32), before)


def test_opcheck(device: torch.device) -> None:
    opcheck(torch.ops.pyreg.scale_rows_.default, (torch.randn(3, 4, device=device), torch.randn(3, device=device)))


def test_direct_misuse_is_an_error(device: torch.device) -> None:
    rows = torch.randn(4, 6, device=device)
    for bad_rows, factor in ((rows, rows[:3, 0]), (rows[:, ::2], rows[:, 0]), (rows, rows)):
        with pytest.raises(ValueError, match="pyreg::scale_rows_: expected"):
            torch.ops.pyreg.scale_rows_(bad_rows, factor)
