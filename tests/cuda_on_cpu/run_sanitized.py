"""Runs pytest with the emulated CUDA libraries built and run under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/cuda_on_cpu/run_sanitized.py tests/cuda_on_cpu -q

All arguments are pytest's. Ends with an error where the sanitized environment cannot be set up.
"""

from __future__ import annotations

import os
import sys

from emulation import sanitized_environment


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: run_sanitized.py TEST_PATH [pytest arguments]")
    try:
        environment = sanitized_environment()
    except RuntimeError as error:
        sys.exit(f"run_sanitized: {error}")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
