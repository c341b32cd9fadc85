"""Measures every operator beside what a user would run instead, and beside the floor of the machine.

    python -m bench [--quick] [--device cpu|cuda|auto] [OPERATOR ...]      one interleaved run, rows of CSV, one page
    pytest bench/                                                          the same workloads under pytest-benchmark

A new operator is one `bench_<op>.py` with functions `workloads(device, smoke)` and `sweeps(device)`, and its lines in
`targets.toml`.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# torch's profiler, which measures the memory of small calls, otherwise writes two lines for each of them.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Run from the root of the repository, Python finds the folder `pyreg` there before the installed package, and that
# folder has no compiled modules. The root goes last, and the package is imported at once (pytest puts the root first
# again before every file), so that what is measured is what is installed.
if any(Path(entry).resolve() == ROOT for entry in sys.path):
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != ROOT] + [str(ROOT)]

import pyreg  # noqa: E402, F401
