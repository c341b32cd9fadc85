"""The CPU kernels of the instruction sets that this machine has but would not choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyreg import _extension

ORDER = ["baseline", "avx2", "avx512"]


@pytest.mark.parametrize("isa", ORDER[:-1])
def test_kernels_of_lower_instruction_sets(isa: str) -> None:
    """The comparisons with the reference, in a process whose kernels are those of `isa`."""
    expected = min(isa, _extension.CPU.build_info["isa"], key=ORDER.index)
    environment = {**os.environ, "PYREG_ISA": isa}
    chosen = subprocess.run(
        [sys.executable, "-c", "from pyreg import _extension as e; print(e.CPU.build_info['isa'])"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert chosen.stdout.strip() == expected
    files = [
        "tests/test_stablemax.py",
        "tests/test_orthograd.py",
        "tests/test_scale_rows.py",
        "tests/test_weight_compander.py",
        "tests/test_conr.py",
        "tests/test_info_nce.py",
        "tests/test_supcon.py",
    ]
    selection = (
        "reference or dominant or masked or spread or against_torch or parallel or overflow or largest or strides"
        " or whole_range or infinite or bits_of or derivative or test_options"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--backend=cpu", "-k", selection, *files],
        cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
