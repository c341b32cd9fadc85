"""OTT-JAX as a contender: in a process of its own, for jax and torch seldom agree on what they depend on.

`PYREG_BENCH_OTT` names the Python that has it: `python3 -m venv ott && ott/bin/pip install ott-jax`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

VARIABLE = "PYREG_BENCH_OTT"


def is_there() -> bool:
    return bool(os.environ.get(VARIABLE))


def solver(epsilon: float, iterations: int, **arrays: Tensor) -> Callable[[], float]:
    """Solves, in float32, for a `cost`, between `x` and `y`, or for the Monge gap of `source` and `mapped`, there with
    their gradients; returns the mean value.

    A call takes some 50 us more than OTT-JAX does: the way there and back."""
    if not is_there():
        raise ModuleNotFoundError(f"set {VARIABLE} to a Python that has ott-jax")
    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "problem.json").write_text(json.dumps({"epsilon": epsilon, "iterations": iterations}))
        np.savez(folder / "arrays.npz", **{key: tensor.detach().numpy() for key, tensor in arrays.items()})
        process = subprocess.Popen(
            [os.environ[VARIABLE], str(Path(__file__).with_name("ott_server.py")), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        ask, answer = process.stdin, process.stdout
        if ask is None or answer is None or answer.readline() != "ready\n":
            raise RuntimeError("OTT-JAX did not come up: see its error above")

    def call() -> float:
        ask.write("go\n")
        ask.flush()
        return float(answer.readline())

    weakref.finalize(call, process.kill)
    return call
