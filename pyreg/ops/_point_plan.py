r"""One pass over the plan between points, ``E_ij = exp((F_i + G_j - C_ij) / eps)``, which is never held.

Of a batch, with ``x [B, n, d]``, ``y [B, m, d]`` and factors ``u [B, n, k]``, ``z [B, m, k]``:

.. code-block:: text

    rows     E z                by_x_i = sum_j E_ij (u_i . z_j) dC_ij / dx_i
    columns  E^T u              by_y_j = sum_i E_ij (u_i . z_j) dC_ij / dy_j

With ``times_cost`` rows and columns are of ``E_ij C_ij``, by_x and by_y of ``E_ij (C_ij - eps)``.

These are what ``sum_ij E_ij (u_i . z_j)``, or ``sum_ij E_ij C_ij (u_i . z_j)``, has as gradients, ``-1 / eps`` times
by_x and by_y: gradients of products with E are such passes again. Those of by_x and by_y, which second derivatives ask
for, are torch's own operators', in panels of rows.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from pyreg.ops import _library, _pairwise_cost
from pyreg.ops._potentials import LARGEST_EXPONENT
from pyreg.ops._streaming import RowFunction, Tensors


def point_plan(
    points: tuple[Tensor, Tensor],
    potentials: tuple[Tensor, Tensor],
    epsilon: Tensor,
    point_cost: int,
    u: Tensor | None = None,
    z: Tensor | None = None,
    *,
    rows: bool = False,
    columns: bool = False,
    by_x: bool = False,
    by_y: bool = False,
    times_cost: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is asked for of the above, and zeros.

    Differentiable in all tensors but epsilon, to any order. Points of cosines have length 1."""
    x, y = points
    if u is None:
        u = x.new_zeros((*x.shape[:2], z.shape[2] if z is not None else 1))
    if z is None:
        z = y.new_zeros((*y.shape[:2], u.shape[2]))
    flags = (point_cost, times_cost, rows, columns, by_x, by_y)
    return _differentiable(*points, *potentials, epsilon, u, z, *flags)  # type: ignore[no-any-return]


# ---- by torch's operators ----


def _panel(flags: tuple[int, bool, bool, bool, bool, bool], rows: Tensors, shared: Tensors) -> tuple[Tensors, Tensors]:
    point_cost, times_cost, with_rows, with_columns, with_x, with_y = flags
    (x, f, u), (y, g, epsilon, z) = rows, shared
    with _library.no_autocast(x):
        costs = _pairwise_cost.cost_of_computed(x, y, point_cost)
        exponents = (f.unsqueeze(2) - costs + g.unsqueeze(1)) / epsilon.view(-1, 1, 1)
        plan = exponents.clamp(max=LARGEST_EXPONENT[x.dtype]).to(x.dtype).exp()
        summed = plan * costs if times_cost else plan
        of_rows = summed @ z if with_rows else torch.zeros_like(u)
        of_columns = summed.mT @ u if with_columns else torch.zeros_like(z)
        by_x, by_y = torch.zeros_like(x), torch.zeros_like(y)
        if with_x or with_y:
            if times_cost:
                plan = plan * (costs - epsilon.view(-1, 1, 1).to(x.dtype))
            pulls = _pairwise_cost.pull(plan * (u @ z.mT), x, y, costs, point_cost)
            by_x, by_y = (pulls[0] if with_x else by_x), (pulls[1] if with_y else by_y)
    return (of_rows, by_x), (of_columns, by_y)


def _row_function(flags: tuple[Any, ...]) -> RowFunction:
    return RowFunction(functools.partial(_panel, flags), rows=3, shared=4, row_results=2, sums=2)


def _plain(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, u: Tensor, z: Tensor, *flags: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, by_x, columns, by_y = _row_function(flags)(y.shape[1], x, f, u, y, g, epsilon, z)
    return rows, columns, by_x, by_y


# ---- the operator ----


def _on_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _library.has_triton():
        return _plain(*arguments)
    kernels = importlib.import_module("pyreg.triton_kernels.point_plan")
    return kernels.point_plan(*arguments)  # type: ignore[no-any-return]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.flags = inputs[7:]
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, by_rows: Tensor | None, by_columns: Tensor | None, by_by_x: Tensor | None, by_by_y: Tensor | None
) -> tuple[Tensor | None, ...]:
    no_flags = (None,) * 6
    point_cost, times_cost, with_rows, with_columns, with_x, with_y = ctx.flags
    by_rows, by_columns, by_by_x, by_by_y = (
        gradient if is_there else None
        for gradient, is_there in (
            (by_rows, with_rows),
            (by_columns, with_columns),
            (by_by_x, with_x),
            (by_by_y, with_y),
        )
    )
    if by_by_x is not None or by_by_y is not None:
        return *_general_gradient(ctx, by_rows, by_columns, by_by_x, by_by_y), *no_flags
    if by_rows is None and by_columns is None:
        return *(None,) * 7, *no_flags
    x, y, f, g, epsilon, u, z = ctx.saved_tensors
    # sum_ij E_ij (u'_i . z'_j) has the gradients that are asked for.
    left, right = [], []
    if by_rows is not None:
        left.append(by_rows)
        right.append(z)
    if by_columns is not None:
        left.append(u)
        right.append(by_columns)
    u_all, z_all = (torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in (left, right))
    need_x, need_y, need_f, need_g, _, need_u, need_z = ctx.needs_input_grad[:7]
    rows, columns, by_x, by_y = point_plan(
        *((x, y), (f, g), epsilon, point_cost, u_all.contiguous(), z_all.contiguous()),
        rows=need_f or (need_u and by_columns is not None),
        columns=need_g or (need_z and by_rows is not None),
        by_x=need_x,
        by_y=need_y,
        times_cost=times_cost,
    )
    per_exponent = 1 / epsilon.view(-1, 1)
    scale = -per_exponent.unsqueeze(2).to(x.dtype)
    k = u.shape[2]
    return (
        by_x * scale if need_x else None,
        by_y * scale if need_y else None,
        (u_all * rows).sum(2, dtype=f.dtype) * per_exponent if need_f else None,
        (z_all * columns).sum(2, dtype=g.dtype) * per_exponent if need_g else None,
        None,
        rows[..., -k:] if need_u and by_columns is not None else None,
        columns[..., :k] if need_z and by_rows is not None else None,
        *no_flags,
    )


def _general_gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, f, g, epsilon, u, z = ctx.saved_tensors
    by_rows, by_columns, by_by_x, by_by_y = (
        torch.zeros_like(like) if gradient is None else gradient
        for gradient, like in zip(gradients, (u, z, x, y), strict=True)
    )
    pulled = _row_function(ctx.flags).pullback()
    by_x, by_f, by_u, by_y, by_g, _, by_z = pulled(
        *(y.shape[1], x, f, u, by_rows, by_by_x, y, g, epsilon, z, by_columns, by_by_y)
    )
    return by_x, by_y, by_f, by_g, None, by_u, by_z


@_library.fake("point_plan")
def _fake(x: Tensor, y: Tensor, f: Tensor, g: Tensor, epsilon: Tensor, u: Tensor, z: Tensor, *_: Any) -> Tensors:
    return tuple(torch.empty_like(like, memory_format=torch.contiguous_format) for like in (u, z, x, y))


_library.implement("point_plan", _on_cuda, ["CUDA"])
_library.vmap_into_batch("point_plan")
_differentiable = _library.differentiable("point_plan", setup_context=_setup, backward=_backward)
