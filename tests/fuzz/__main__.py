"""Rounds of random examples until the time is over: python -m tests.fuzz MINUTES [pytest arguments].

A round is every property with some examples and a seed of its own, so that all operators have had their turn soon. The
first failure ends the run; its output has the arguments and how to make them again, and its seed is printed.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    end, rounds = time.monotonic() + 60 * float(sys.argv[1]), 0
    environment = {**os.environ, "PYREG_FUZZ": "pyreg-long"}
    while (left := end - time.monotonic()) > 0:
        seed = secrets.randbelow(2**31)
        command = [sys.executable, "-m", "pytest", "tests/fuzz", "-q", "-x", f"--hypothesis-seed={seed}", *sys.argv[2:]]
        try:
            done = subprocess.run(command, env=environment, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            break
        if done.returncode != 0:
            print(f"round {rounds + 1} failed; again: PYREG_FUZZ=pyreg-long {' '.join(command)}")
            return done.returncode
        rounds += 1
    print(f"{rounds} whole rounds without a failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
