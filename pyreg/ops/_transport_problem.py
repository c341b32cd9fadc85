"""From public arguments to a solved transport problem: weights, penalties, epsilon, where to begin; their checks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyreg.ops import _checks
from pyreg.ops._dense_cost import DenseCost
from pyreg.ops._point_cost import PointCost
from pyreg.ops._potentials import Side
from pyreg.ops._problems import Entries, Problems
from pyreg.ops._transport import Progress, Transport

REFERENCES = ("product", "counting")

Number = float | Tensor
Start = Transport | tuple[Tensor, Tensor]

# Weights whose sums must be equal may differ by what rounding leaves.
_MASS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class Options(NamedTuple):
    """What problems between points and with a cost matrix have in common, as the public functions take it."""

    a: Tensor | None
    b: Tensor | None
    epsilon: Number | None
    relative_epsilon: float | None
    rho_a: Number | None
    rho_b: Number | None
    reference: str
    max_iter: int
    tol: float
    epsilon_scaling: float | None
    init: Start | None


def solve(
    operator: str,
    cost: DenseCost | PointCost,
    problems: Problems,
    options: Options,
    like: Tensor,
    name: str,
    points: Tensor | None = None,
) -> Transport:
    """
    Args:
        like, name: the argument whose dtype and device the others must have.
        points: the columns', ``[B, m, d]``.
    """
    row, column, progress = solve_sides(operator, cost, problems, options, like, name)
    return Transport(operator, cost, row, column, progress, problems, points)


def solve_sides(
    operator: str, cost: DenseCost | PointCost, problems: Problems, options: Options, like: Tensor, name: str
) -> tuple[Side, Side, Progress]:
    """Rows and columns, and how far the iteration has come."""
    is_counting = _check_reference(operator, options.reference)
    max_iter, tol = _check_iterations(operator, options.max_iter, options.tol)
    arguments = _Arguments(operator, like, name)

    def weights_and_penalties() -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        a = arguments.weights("a", options.a, problems.rows)
        b = arguments.weights("b", options.b, problems.columns)
        rho_a = arguments.rho("rho_a", options.rho_a, problems.rows)
        rho_b = arguments.rho("rho_b", options.rho_b, problems.columns)
        cost.check(operator, a, b, rho_a, rho_b)
        return a, b, rho_a, rho_b

    a, b, rho_a, rho_b = problems.rows.agree(weights_and_penalties)
    masses = problems.rows.over_ranks(a.detach().sum(1)), b.detach().sum(1)
    must_hold = _both_must_hold(problems, rho_a, rho_b, masses[0])
    if options.a is not None or options.b is not None:
        _check_masses(operator, options, masses)
        b = b * _equal_mass(operator, masses, must_hold, like.dtype)
    epsilon = arguments.epsilon(options.epsilon, options.relative_epsilon, cost, problems.shape)
    first, factor = _first_epsilon(operator, options.epsilon_scaling, cost, epsilon)
    start = _start(operator, options.init, problems, is_counting, b, epsilon, first)

    f, g, error, iterations = cost.potentials(
        *(a, b, rho_a, rho_b, epsilon, first, factor, is_counting, max_iter, tol, start)
    )
    row, column = Side(f, a, rho_a, epsilon, is_counting), Side(g, b, rho_b, epsilon, is_counting)
    over_ranks = problems.rows.over_ranks
    apart, mass = over_ranks(row.sum(f)) - column.sum(g), over_ranks(a.sum(1)) + b.sum(1)
    shift = torch.where(must_hold, apart / mass, 0).unsqueeze(1)
    row, column = Side(f - shift, a, rho_a, epsilon, is_counting), Side(g + shift, b, rho_b, epsilon, is_counting)
    return row, column, Progress(error, iterations, tol, max_iter)


class _Arguments:
    """Checks and converts tensors that go with another."""

    def __init__(self, operator: str, like: Tensor, name: str) -> None:
        self._operator, self._like, self._name = operator, like, name

    def check_beside(self, name: str, tensor: Any) -> None:
        _checks.check_beside(self._operator, name, tensor, self._like, self._name)

    def weights(self, name: str, weights: Tensor | None, entries: Entries) -> Tensor:
        """``[B, n]``, float64."""
        if weights is None:
            return entries.uniform(self._like)
        self.check_beside(name, weights)
        dtype = self._like.dtype
        if weights.dtype != dtype:
            raise TypeError(
                f"{self._operator}: expected {name} of the dtype of {self._name}, {dtype}, got {weights.dtype}; "
                f"convert it with {name}.to({dtype})"
            )
        result = self._expanded(name, weights, entries, 0)
        _checks.check_weights(self._operator, name, weights)
        return result

    def rho(self, name: str, rho: Number | None, entries: Entries) -> Tensor | None:
        """``[B, n]``, float64; None where all of it is known to be infinite."""
        if isinstance(rho, Tensor):
            self.check_beside(name, rho)
            _checks.check_real(self._operator, name, rho)
            _checks.check_constant(self._operator, name, rho)
            if _checks.reads_values(rho) and rho.numel() > 0:
                if not bool((rho > 0).all()):
                    wrong = rho[~(rho > 0)].flatten()[0].item()
                    raise ValueError(
                        f"{self._operator}: expected {name} to be above 0, got {wrong}; inf holds a marginal"
                    )
                if bool((rho == math.inf).all()):
                    return None
            return self._expanded(
                name, (rho.expand(entries.shape) if rho.dim() == 0 else rho).detach(), entries, math.inf
            )
        if rho is None or (isinstance(rho, (int, float)) and rho == math.inf):
            return None
        if not isinstance(rho, (int, float)) or not rho > 0:
            raise ValueError(
                f"{self._operator}: expected {name} to be a number above 0, inf, or a tensor of such, got {rho!r}"
            )
        return torch.full_like(entries.uniform(self._like), float(rho))

    def _expanded(self, name: str, tensor: Tensor, entries: Entries, fill: float) -> Tensor:
        symbol, shape = "n" if name.endswith("a") else "m", entries.shape
        if tensor.dim() == 0 or tensor.dim() > len(shape) or tensor.shape != shape[len(shape) - tensor.dim() :]:
            expected = f"[{symbol}] = [{shape[-1]}]"
            if len(shape) > 1:
                expected += f" or [..., {symbol}] = {list(shape)}"
            raise ValueError(f"{self._operator}: expected {name} of shape {expected}, got {list(tensor.shape)}")
        return entries.inside(tensor.double().expand(shape), fill).contiguous()

    def epsilon(
        self, epsilon: Number | None, relative: float | None, cost: DenseCost | PointCost, shape: tuple[int, ...]
    ) -> Tensor:
        """``[B]``, float64."""
        operator = self._operator
        if (epsilon is None) == (relative is None):
            given = "neither" if epsilon is None else "both"
            raise ValueError(f"{operator}: expected either epsilon or relative_epsilon, got {given}")
        if epsilon is None:
            factor = _checks.check_number(operator, "relative_epsilon", relative, 0, or_equal=False)  # type: ignore[arg-type]
            means = cost.mean()
            if _checks.reads_values(means) and not bool((means > 0).all()):
                raise ValueError(
                    f"{operator}: expected costs with a mean above 0 for relative_epsilon, got "
                    f"{means.min().item():.3g}; give epsilon"
                )
            return factor * means
        if not isinstance(epsilon, Tensor):
            epsilon = _checks.check_number(operator, "epsilon", epsilon, 0, or_equal=False)
            return self._like.new_full(shape, epsilon, dtype=torch.float64).reshape(-1)
        self.check_beside("epsilon", epsilon)
        _checks.check_constant(operator, "epsilon", epsilon)
        if epsilon.dim() > len(shape) or epsilon.shape != shape[len(shape) - epsilon.dim() :]:
            raise ValueError(
                f"{operator}: expected epsilon to be a number or of the batch's shape {list(shape)}, got "
                f"{list(epsilon.shape)}"
            )
        if _checks.reads_values(epsilon) and epsilon.numel() > 0:
            _checks.check_finite(operator, "epsilon", epsilon)
            if (least := epsilon.min().item()) <= 0:
                raise ValueError(f"{operator}: expected epsilon to be above 0, got {least}")
        return epsilon.detach().double().expand(shape).reshape(-1).contiguous()


def _check_reference(operator: str, reference: str) -> bool:
    """Whether it is the counting one."""
    if reference not in REFERENCES:
        raise ValueError(f"{operator}: expected reference to be 'product' or 'counting', got {reference!r}")
    return reference == "counting"


def _check_iterations(operator: str, max_iter: int, tol: float) -> tuple[int, float]:
    if not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"{operator}: expected max_iter to be an integer >= 1, got {max_iter!r}")
    return max_iter, _checks.check_number(operator, "tol", tol, 0, or_equal=True)


def _both_must_hold(problems: Problems, rho_a: Tensor | None, rho_b: Tensor | None, like: Tensor) -> Tensor:
    """``[B]``: which problems have no finite penalty."""
    finite = torch.zeros_like(like)
    if rho_a is not None:
        finite = finite + (rho_a != torch.inf).sum(1)
    finite = problems.rows.over_ranks(finite)
    if rho_b is not None:
        finite = finite + (rho_b != torch.inf).sum(1)
    return finite == 0


def _check_masses(operator: str, options: Options, masses: tuple[Tensor, Tensor]) -> None:
    for name, given, mass in zip("ab", options[:2], masses, strict=True):
        if given is not None and _checks.reads_values(mass) and not bool((mass > 0).all()):
            raise ValueError(f"{operator}: expected {name} with a weight above 0 in every problem, got all 0")


def _equal_mass(operator: str, masses: tuple[Tensor, Tensor], must_hold: Tensor, dtype: torch.dtype) -> Tensor:
    """What b is multiplied by to have a's sum where both marginals must hold, ``[B, 1]``."""
    if _checks.reads_values(masses[0]):
        apart = must_hold & ((masses[0] - masses[1]).abs() > _MASS_TOLERANCE[dtype] * masses[0])
        if bool(apart.any()):
            of_a, of_b = (mass[apart][0].item() for mass in masses)
            raise ValueError(
                f"{operator}: expected a and b of equal sums where both marginals must hold, got {of_a:.8g} and "
                f"{of_b:.8g}; divide them by their sums, or give rho_a or rho_b"
            )
    return torch.where(must_hold, masses[0] / masses[1], 1).unsqueeze(1)


def _first_epsilon(
    operator: str, scaling: float | None, cost: DenseCost | PointCost, epsilon: Tensor
) -> tuple[Tensor, float]:
    """Where stages of epsilon begin, ``[B]``, and the factor between them."""
    if scaling is None:
        return epsilon, 0.5  # without stages
    factor = _checks.check_number(operator, "epsilon_scaling", scaling, 0, or_equal=False)
    if factor >= 1:
        raise ValueError(f"{operator}: expected epsilon_scaling to be a factor between 0 and 1, got {scaling!r}")
    return torch.maximum(cost.range(), epsilon), factor


def _start(
    operator: str,
    init: Start | None,
    problems: Problems,
    is_counting: bool,
    b: Tensor,
    epsilon: Tensor,
    first_epsilon: Tensor,
) -> Tensor:
    """The columns' potentials with ``eps log b`` to begin with, ``[B, m]``."""
    weights = b.detach()
    if init is None:
        return first_epsilon.unsqueeze(1) * weights.log()
    if isinstance(init, Transport):
        f, g = init.potentials()
    elif isinstance(init, tuple) and len(init) == 2 and all(isinstance(part, Tensor) for part in init):
        f, g = init
    else:
        raise TypeError(f"{operator}: expected init to be a Transport or potentials (f, g), got {type(init).__name__}")
    if f.shape != problems.rows.shape or g.shape != problems.columns.shape or g.device != b.device:
        raise ValueError(
            f"{operator}: expected init with f of shape {list(problems.rows.shape)} and g of shape "
            f"{list(problems.columns.shape)} on {b.device}, got {list(f.shape)} and {list(g.shape)} on {g.device}"
        )
    start = problems.columns.inside(g.detach()).double()
    if _checks.reads_values(start):
        _checks.check_finite(operator, "init's g", start[weights > 0])
    if not is_counting:
        start = start + epsilon.unsqueeze(1) * weights.log()
    return torch.where(weights > 0, start, -torch.inf).contiguous()
