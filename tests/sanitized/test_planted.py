"""AddressSanitizer sees what a CPU kernel reads and writes beyond a tensor's memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.sanitized

# A tensor of 32 numbers on memory for fewer: what a kernel does to it is out of bounds.
OVERRUN = """
import ctypes, importlib.util, sys
import torch
path, operator, numbers = sys.argv[1], sys.argv[2], int(sys.argv[3])
spec = importlib.util.spec_from_file_location("pyreg._C", path)
sys.modules["pyreg._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pyreg._C"])
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
address = libc.malloc(4 * numbers)
ctypes.memset(address, 0, 4 * numbers)
rows = torch.frombuffer((ctypes.c_float * 32).from_address(address), dtype=torch.float32).view(4, 8)
if operator == "write":
    torch.ops.pyreg.scale_rows_(rows, torch.tensor([2.0, 3.0, 4.0, 5.0]))
else:
    torch.ops.pyreg.stablemax(rows, 1, torch.float32)
print("went through")
"""


@pytest.mark.parametrize("operator", ["write", "read"])
@pytest.mark.parametrize("numbers", [32, 31])
def test_an_overrun_is_caught(operator: str, numbers: int) -> None:
    import pyreg._C

    command = [sys.executable, "-c", OVERRUN, pyreg._C.__file__, operator, str(numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if numbers == 32:
        assert (done.returncode, done.stdout.strip()) == (0, "went through"), done.stderr
    else:
        assert done.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
        assert "pyreg::" in done.stderr
