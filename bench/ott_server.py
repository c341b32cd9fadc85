"""OTT-JAX in a Python of its own, for `ott_jax.py`: solves the problem in the folder given each time a line comes in.

It imports nothing of bench, which that Python need not have, and answers each line by a value."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from ott.geometry import costs, geometry, pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn


def main(folder: Path) -> None:
    options = json.loads((folder / "problem.json").read_text())
    arrays = np.load(folder / "arrays.npz")
    iterations = options["iterations"]
    solver = sinkhorn.Sinkhorn(
        threshold=-1.0, min_iterations=iterations, max_iterations=iterations, inner_iterations=iterations
    )

    def of_cost(cost: jax.Array) -> jax.Array:
        return solver(linear_problem.LinearProblem(geometry.Geometry(cost, epsilon=options["epsilon"]))).reg_ot_cost

    def of_points(x: jax.Array, y: jax.Array) -> jax.Array:
        points = pointcloud.PointCloud(x, y, cost_fn=costs.SqEuclidean(), epsilon=options["epsilon"])
        return solver(linear_problem.LinearProblem(points)).reg_ot_cost

    def of_pairs(x: jax.Array, y: jax.Array) -> jax.Array:
        """The Monge gap, as `ott.neural.methods.monge_gap`, which asks for more packages, has it."""
        points = pointcloud.PointCloud(x, y, cost_fn=costs.SqEuclidean(), epsilon=options["epsilon"])
        displacement = jax.numpy.mean(jax.vmap(costs.SqEuclidean())(x, y))
        return displacement - solver(linear_problem.LinearProblem(points)).ent_reg_cost

    if "cost" in arrays:
        inputs = (jax.numpy.asarray(arrays["cost"]),)
        call = jax.jit(of_cost if inputs[0].ndim == 2 else jax.vmap(of_cost))
    else:
        is_gap = "mapped" in arrays
        inputs = tuple(jax.numpy.asarray(arrays[name]) for name in (("source", "mapped") if is_gap else "xy"))
        call = jax.jit(jax.value_and_grad(of_pairs if is_gap else of_points, argnums=(0, 1)))
    jax.block_until_ready(call(*inputs))  # compiles
    print("ready", flush=True)
    for _ in sys.stdin:
        result = jax.block_until_ready(call(*inputs))
        value = result if "cost" in arrays else result[0]
        print(float(np.mean(value)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
