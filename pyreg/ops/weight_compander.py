"""The weight compander: the public functions, the forms for all tensors of a model, and how torch differentiates them.

Kernels: ``csrc/weight_compander``. Definition, and path of devices without a kernel and of ``torch.func``:
:mod:`pyreg.reference.weight_compander`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyreg.ops import _checks, _library
from pyreg.ops._options import Kind
from pyreg.reference import weight_compander as reference

KINDS = ("arctan", "arsinh", "erf")

Constant = Tensor | float  # a or b of one tensor


# ---- public functions ----


def weight_compander(v: Tensor, a: Constant, b: Constant, kind: Kind = "arctan") -> Tensor:
    r"""Weights as a saturating function of the values that are trained.

    .. code-block:: text

        w = Psi(v) = a f(u),   u = v / b,   Psi'(v) = (a / b) f'(u)

        kind      f          f'                         range of w
        arctan    arctan u   1 / (1 + u^2)              |w| < |a| pi / 2
        arsinh    arsinh u   1 / sqrt(1 + u^2)          all
        erf       erf u      2 / sqrt(pi) exp(-u^2)     |w| < |a|

    Small weights learn with the slope ``a / b``, large ones more and more slowly: fewer weights stay near zero and the
    range shrinks. :func:`pyreg.compand` does this to all layers of a model.

    Args:
        v: any shape; float64, float32, bfloat16 or float16. Infinities give the limits of ``f``.
        a: the scale of w, a number or a tensor: one value, or one for each slice of v's dimension 0 (an output channel)
            in the shape ``[C]`` or ``[C, 1, ..., 1]``. Of any sign, but finite and not 0. Any of v's dtypes.
        b: the scale of v, likewise.
        kind: ``"arctan"``, ``"arsinh"`` or ``"erf"``.

    Returns:
        w, of v's shape and dtype, its elements in the order of v's in memory where those lie densely. Autocast changes
        nothing: weights keep their dtype, and the layer that uses them casts. Computed in float32, float64 in float64.

    Gradient:
        With g = dL/dw: ``dv = g Psi'(v)``, ``da = sum g f(u)``, ``db = -(a / b) sum g u f'(u)``, to any order. The
        first order is one fused pass, with the sums kept in float64, the same bits on every run; nothing but v, a and b
        is saved. Under ``create_graph``, in ``torch.func`` and in forward mode they are plain expressions.

    Raises:
        TypeError: v, a or b is of another type or dtype.
        ValueError: a or b is 0, not finite, of a wrong shape or on another device than v; the kind is unknown. Values
            in CUDA tensors are looked at only with ``PYREG_CHECKS=1`` in the environment, which waits for the GPU;
            without it a zero or a NaN makes the result 0, infinite or NaN as the formula does.

    Source: Cakaj et al., "Weight Compander: A Simple Weight Reparameterization for Regularization", arXiv 2306.16993.

    Example:
        >>> v = torch.tensor([-1.0, 0.0, 1.0, 100.0])
        >>> pyreg.functional.weight_compander(v, a=0.5, b=1.0)
        tensor([-0.3927,  0.0000,  0.3927,  0.7804])
    """
    return _companders("weight_compander", (v,), (a,), (b,), kind)[0]


def weight_compander_inverse(w: Tensor, a: Constant, b: Constant, kind: Kind = "arctan", clamp: bool = False) -> Tensor:
    r"""The ``v`` that :func:`weight_compander` maps to ``w``: how companded weights are initialised.

    .. code-block:: text

        v = b tan(w / a),   b sinh(w / a)   or   b erfinv(w / a)

    Args:
        w: any shape; float64, float32, bfloat16 or float16. It has to lie in the range that a finite v of its dtype can
            reach: ``|w| < |a| pi / 2`` for arctan, ``|w| < |a|`` for erf.
        a, b, kind: as for :func:`weight_compander`.
        clamp: brings values from beyond the range, infinities too, just inside: to ``1 - eps`` of the limit, with w's
            machine epsilon. v is then large but finite, and its slope almost 0: such weights hardly learn.

    Returns:
        v, of w's shape and dtype; computed in float64.

    Gradient:
        In w, a and b, by torch's own functions, to any order.

    Raises:
        TypeError, ValueError: as for :func:`weight_compander`.
        ValueError: w holds NaN, or is out of range; the message names the largest \|w\| and the limit. The check reads
            all of w, and waits for a GPU: the function is for initialisation, not for a training step.

    Source: arXiv 2306.16993.

    Example:
        >>> pyreg.functional.weight_compander_inverse(torch.tensor([-0.3927, 0.3927]), a=0.5, b=1.0)
        tensor([-1.0000,  1.0000])
    """
    name = "weight_compander_inverse"
    _check_kind(name, kind)
    _checks.check_flag(name, "clamp", clamp)
    _check_tensor(name, w, "w")
    for what, constant in (("a", a), ("b", b)):
        _check_constant(name, constant, w, what, "w")
        if isinstance(constant, Tensor):
            _check_values(name, constant, what)
    x, a64, b64 = reference.computed(w, a, b, torch.float64)
    ratio = x / a64
    # The largest number of w's dtype that v may be, in units of b; v is to be finite in that dtype.
    bound = reference.FUNCTION[kind](torch.finfo(w.dtype).max / b64.abs().clamp_min(1.0)).detach()
    if clamp:
        inside = bound * (1 - torch.finfo(w.dtype).eps)
        ratio = ratio.clamp(-inside, inside)
    _check_range(w.detach(), ratio.detach(), bound, a64.detach(), kind)
    return (b64 * reference.INVERSE[kind](ratio)).to(w.dtype)


# ---- all tensors of a model at once ----


def weight_companders(
    vs: Sequence[Tensor], a: Sequence[Constant], b: Sequence[Constant], kind: str = "arctan"
) -> list[Tensor]:
    """:func:`weight_compander` of every tensor, with an a and a b for each, in one fused pass a device.

    The gradients too are one pass, which waits for those by all ws. A tensor that comes several times in ``a`` and
    ``b`` gets its whole gradient from that pass.
    """
    return _companders("weight_companders", vs, a, b, kind)


@torch.no_grad()
def to_weight_gradients_(
    grads: Sequence[Tensor],
    vs: Sequence[Tensor],
    a: Sequence[Constant],
    b: Sequence[Constant],
    kind: str = "arctan",
    decay: float = 0.0,
    decay_on: str = "w",
) -> None:
    """Gradients by v become those by w, in place, for an optimizer that takes its moments on them; one fused pass.

    .. code-block:: text

        grad <- (grad + 2 decay w p) / p = grad / p + 2 decay w     or     (grad + 2 decay v) / p,   p = Psi'(v)

    the second terms being the gradients of ``decay sum w^2`` and ``decay sum v^2``. Where p underflows to 0 the
    quotient counts as 0: v does not move there, and the optimizer's moments stay finite. The largest finite numbers of
    the dtype bound the result. A gradient that is not finite stays as it is.
    """
    name = "to_weight_gradients_"
    code = _check_kind(name, kind)
    _check_lists(name, vs, a, b, grads=grads)
    if decay_on not in ("w", "v"):
        raise ValueError(f"{name}: expected decay_on to be 'w' or 'v', got {decay_on!r}")
    if not math.isfinite(decay):
        raise ValueError(f"{name}: expected a finite decay, got {decay}")
    decays = (decay, 0.0) if decay_on == "w" else (0.0, decay)
    for of_device in _by_device(vs):
        if _library.has_kernel(vs[of_device[0]]):
            constants = _collect(_pick(a, of_device), _pick(b, of_device))
            _to_weight_gradients(_pick(grads, of_device), _pick(vs, of_device), *constants, code, *decays)
        else:
            for i in of_device:
                reference.to_weight_gradient_(grads[i], vs[i], a[i], b[i], kind, decay, decay_on)


@torch.no_grad()
def rescale_steps_(
    vs: Sequence[Tensor],
    old_vs: Sequence[Tensor],
    a: Sequence[Constant],
    b: Sequence[Constant],
    kind: str = "arctan",
) -> None:
    """``v <- old + (v - old) Psi'(old)`` in place: steps that were taken as if v were w become steps of v."""
    name = "rescale_steps_"
    code = _check_kind(name, kind)
    _check_lists(name, vs, a, b, old_vs=old_vs)
    for of_device in _by_device(vs):
        if _library.has_kernel(vs[of_device[0]]):
            constants = _collect(_pick(a, of_device), _pick(b, of_device))
            _rescale_steps(_pick(vs, of_device), _pick(old_vs, of_device), *constants, code)
        else:
            for i in of_device:
                reference.rescale_step_(vs[i], old_vs[i], a[i], b[i], kind)


# ---- argument checks ----


def _check_kind(operator: str, kind: str) -> int:
    try:
        return KINDS.index(kind)
    except ValueError:
        raise ValueError(f"{operator}: expected kind to be 'arctan', 'arsinh' or 'erf', got {kind!r}") from None


def _check_lists(
    operator: str, vs: Sequence[Tensor], a: Sequence[Constant], b: Sequence[Constant], **others: Sequence[Tensor]
) -> None:
    for name, list_ in {"a": a, "b": b, **others}.items():
        if len(list_) != len(vs):
            raise ValueError(f"{operator}: expected {name} of one item a tensor, {len(vs)}, got {len(list_)}")
    for i, v in enumerate(vs):
        _check_tensor(operator, v, "vs", i)
        _check_constant(operator, a[i], v, "a", "vs", i)
        _check_constant(operator, b[i], v, "b", "vs", i)
    if _library.checks_values():
        for name, list_ in (("a", a), ("b", b)):
            for i, constant in enumerate(list_):
                if isinstance(constant, Tensor) and constant.is_cuda:
                    _check_values(operator, constant, name, i)


def _item(operator: str, name: str, i: int) -> str:
    """How an error names one of a list of arguments, or the one that the operator has."""
    if operator in ("weight_compander", "weight_compander_inverse"):
        return name.removesuffix("s")
    return f"{name}[{i}]"


def _check_tensor(operator: str, tensor: Any, name: str, i: int = 0) -> None:
    if isinstance(tensor, Tensor) and tensor.dtype in _library.FLOAT_DTYPES and tensor.layout == torch.strided:
        return
    _library.check_float(operator, _item(operator, name, i), tensor)


def _check_constant(operator: str, constant: Any, v: Tensor, name: str, of: str, i: int = 0) -> None:
    """``name``, a or b, of one tensor ``of``: type, shape, device, and the value of a number."""
    if not isinstance(constant, Tensor):
        name = _item(operator, name, i)
        if isinstance(constant, bool) or not isinstance(constant, (int, float, torch.SymFloat)):
            raise TypeError(f"{operator}: expected {name} to be a number or a tensor, got {type(constant).__name__}")
        if constant == 0 or not -math.inf < constant < math.inf:
            raise ValueError(
                f"{operator}: expected {name} to be finite and not 0, got {constant}; w = a f(v / b) needs both a and b"
            )
        return
    _check_tensor(operator, constant, name, i)
    count = constant.numel()
    fits = count == 1 or (v.dim() > 0 and constant.dim() > 0 and count == constant.shape[0] == v.shape[0])
    if fits and constant.device == v.device:
        return
    name, of = _item(operator, name, i), _item(operator, of, i)
    if constant.device != v.device:
        raise ValueError(
            f"{operator}: expected {name} on the device {v.device} of {of}, got {constant.device}; "
            f"move it with {name}.to({of}.device)"
        )
    by_slice = f", [{v.shape[0]}] or [{v.shape[0]}, 1, ..., 1]" if v.dim() > 0 else ""
    raise ValueError(
        f"{operator}: expected {name} to hold one value, or one for each slice of dimension 0: shape []{by_slice} for "
        f"{of} of shape {list(v.shape)}, got {list(constant.shape)}"
    )


def _check_values(operator: str, constant: Tensor, name: str, i: int = 0) -> None:
    if constant.is_meta:
        return
    wrong = constant[(constant == 0) | ~constant.isfinite()]
    if wrong.numel() > 0:
        raise ValueError(
            f"{operator}: expected {_item(operator, name, i)} to be finite and not 0, got {wrong[0].item()}; "
            "w = a f(v / b) needs both a and b"
        )


_LIMITS = {"arctan": "|a| pi / 2", "arsinh": "|a| arsinh(largest / max(|b|, 1))", "erf": "|a|"}


def _check_range(w: Tensor, ratio: Tensor, bound: Tensor, a: Tensor, kind: str) -> None:
    """Whether ``|w / a| < bound`` everywhere; the error is about the slice that is furthest out."""
    if w.numel() == 0 or w.is_meta or bool((ratio.abs() < bound).all()):
        return
    name = "weight_compander_inverse"
    if (missing := int(w.isnan().sum())) > 0:
        raise ValueError(f"{name}: expected w without NaN, got {missing} in {w.numel()} elements; replace them first")
    excess, limit, where = ratio.abs() / bound, a.abs() * bound, ""
    if limit.dim() > 0:
        worst = int(excess.reshape(len(w), -1).amax(1).argmax())
        w, limit, where = w[worst], limit.reshape(-1)[worst], f" in slice {worst} of dimension 0"
    raise ValueError(
        f"{name}: expected |w| < {_LIMITS[kind]} = {limit.item():.6g} for kind {kind!r}{where}, got |w| up to "
        f"{w.abs().max().item():.6g}; choose a larger a, or pass clamp=True"
    )


# ---- calls ----


class _Constants(NamedTuple):
    """The a and b of a list of tensors as the operators take them: every tensor and number once, and for each of the
    list the place of its a and its b, in ``tensors`` or, where negative, in ``numbers[-1 - place]``."""

    tensors: list[Tensor]
    numbers: list[float]
    a: list[int]
    b: list[int]

    def at(self, place: int) -> Constant:
        return self.tensors[place] if place >= 0 else self.numbers[-1 - place]


def _collect(a: Sequence[Constant], b: Sequence[Constant]) -> _Constants:
    constants = _Constants([], [], [], [])
    known: dict[object, int] = {}
    for list_, places in ((a, constants.a), (b, constants.b)):
        for constant in list_:
            key: object = (id(constant),) if isinstance(constant, Tensor) else constant
            place = known.get(key)
            if place is None:
                if isinstance(constant, Tensor):
                    constants.tensors.append(constant)
                    place = len(constants.tensors) - 1
                else:
                    constants.numbers.append(float(constant))
                    place = -len(constants.numbers)
                known[key] = place
            places.append(place)
    return constants


def _by_device(vs: Sequence[Tensor]) -> Iterable[list[int]]:
    """The positions of the tensors of each device."""
    positions: dict[torch.device, list[int]] = {}
    for i, v in enumerate(vs):
        positions.setdefault(v.device, []).append(i)
    return positions.values()


T = TypeVar("T")


def _pick(list_: Sequence[T], positions: list[int]) -> list[T]:
    return [list_[i] for i in positions]


def _companders(
    operator: str, vs: Sequence[Tensor], a: Sequence[Constant], b: Sequence[Constant], kind: str
) -> list[Tensor]:
    code = _check_kind(operator, kind)
    _check_lists(operator, vs, a, b)
    ws: dict[int, Tensor] = {}
    for of_device in _by_device(vs):
        if _library.has_kernel(vs[of_device[0]]) and not _is_transformed():
            constants = _collect(_pick(a, of_device), _pick(b, of_device))
            ws.update(zip(of_device, _call(_pick(vs, of_device), constants, code), strict=True))
        else:
            for i in of_device:
                ws[i] = reference.weight_compander(vs[i], a[i], b[i], kind)
    return [ws[i] for i in range(len(vs))]


def _is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work, which the kernels know nothing of."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _call(vs: list[Tensor], constants: _Constants, kind: int) -> Sequence[Tensor]:
    if torch.compiler.is_compiling():
        return _forward(vs, *constants, kind)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*vs, *constants.tensors)):
        return _Companders.apply(vs, constants, kind, *vs, *constants.tensors)  # type: ignore[no-untyped-call, no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(vs, *constants, kind)  # type: ignore[no-any-return]


# ---- gradients ----


_forward = _library.operator("weight_compander")
_backward = _library.operator("weight_compander_backward")
_to_weight_gradients = _library.operator("to_weight_gradients_")
_rescale_steps = _library.operator("rescale_steps_")


class _Companders(torch.autograd.Function):
    """All tensors of one device in one node of the graph; the tensors come once more as arguments of their own, for
    autograd looks into no list."""

    @staticmethod
    def forward(ctx: Any, vs: list[Tensor], constants: _Constants, kind: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            ws = _forward(vs, *constants, kind)
        ctx.save_for_backward(*tensors)
        ctx.options = (constants.numbers, constants.a, constants.b, kind)
        ctx.set_materialize_grads(False)
        return tuple(ws)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        numbers, a, b, kind = ctx.options
        tensors, needs_grad = ctx.saved_tensors, ctx.needs_input_grad[3:]
        constants = _Constants(list(tensors[len(a) :]), numbers, a, b)
        return (None, None, None, *_gradients(grads, tensors[: len(a)], constants, kind, needs_grad))


def _gradients(
    grads: Sequence[Tensor | None],
    vs: Sequence[Tensor],
    constants: _Constants,
    kind: int,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of vs and of the constants that are tensors, None where `needs_grad` says so or no w has one."""
    results: list[Tensor | None] = [None] * len(needs_grad)
    by_w = {i: grad for i, grad in enumerate(grads) if grad is not None}
    if not by_w:
        return results
    if torch.is_grad_enabled() or any(map(_library.is_batched, by_w.values())):
        for i, grad in by_w.items():
            _add_gradients(results, grad, vs, i, constants, KINDS[kind], needs_grad)
        tensors = (*vs, *constants.tensors)
        return [result if result is None else result.to(of.dtype) for result, of in zip(results, tensors, strict=True)]
    used = list(by_w)
    a, b = _pick(constants.a, used), _pick(constants.b, used)
    in_use, count = {*a, *b}, len(vs)
    wanted = {i: needs_grad[i] for i in used}
    wanted |= {count + c: needs_grad[count + c] and c in in_use for c in range(len(constants.tensors))}
    fused = iter(
        _backward(
            list(by_w.values()),
            _pick(vs, used),
            constants.tensors,
            constants.numbers,
            a,
            b,
            kind,
            list(map(int, wanted.values())),
        )
    )
    for i, is_wanted in wanted.items():
        if is_wanted:
            results[i] = next(fused)
    return results


def _add_gradients(
    results: list[Tensor | None],
    grad: Tensor,
    vs: Sequence[Tensor],
    i: int,
    constants: _Constants,
    kind: str,
    needs_grad: Sequence[bool],
) -> None:
    """What w[i] adds to the gradients, as expressions of differentiable functions: for create_graph. In the dtypes that
    are computed in, so that a constant's gradient is rounded once."""
    place_a, place_b = constants.a[i], constants.b[i]
    x, a, b = reference.computed(vs[i], constants.at(place_a), constants.at(place_b))
    u, g = x / b, grad.to(x.dtype)
    by_v = g * (a / b) * reference.DERIVATIVE[kind](u)
    if needs_grad[i]:
        results[i] = by_v
    for place, elements in ((place_a, g * reference.FUNCTION[kind](u)), (place_b, -by_v * u)):
        if place < 0 or not needs_grad[len(vs) + place]:
            continue
        constant, known = constants.tensors[place], results[len(vs) + place]
        rows = constant.numel()
        total = elements.sum() if rows == 1 else elements.sum_to_size(rows, *[1] * (elements.dim() - 1))
        total = total.reshape(constant.shape)
        results[len(vs) + place] = total if known is None else known + total


def _setup_traced(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    vs, tensors, *ctx.options = inputs
    ctx.save_for_backward(*vs, *tensors)
    ctx.set_materialize_grads(False)


def _backward_traced(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    numbers, a, b, kind = ctx.options
    count, tensors = len(a), ctx.saved_tensors
    needs_grad = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    constants = _Constants(list(tensors[count:]), numbers, a, b)
    results = _gradients(grads, tensors[:count], constants, kind, needs_grad)
    # None for each argument that is no list of tensors; an empty list passes for one.
    return results[:count], results[count:], None if numbers else [], None, None, None


# ---- tracing ----


if isinstance(_forward, torch._ops.OpOverload):  # else the extension is not there
    torch.library.register_autograd("pyreg::weight_compander", _backward_traced, setup_context=_setup_traced)
_library.count_versions("to_weight_gradients_", 0)
_library.count_versions("rescale_steps_", 0)


def _empty_in_order_of(v: Tensor) -> Tensor:
    """As csrc/core/layout.h: in the order of v's elements in memory if they lie densely, else contiguous."""
    dense = 1
    for stride, size in sorted((v.stride(axis), v.shape[axis]) for axis in range(v.dim()) if v.shape[axis] != 1):
        if stride != dense and not v.is_contiguous():
            return torch.empty(v.shape, dtype=v.dtype, device=v.device)
        dense *= size
    return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)


@_library.fake("weight_compander")
def _(vs: list[Tensor], *_: Any) -> list[Tensor]:
    return [_empty_in_order_of(v) for v in vs]


@_library.fake("weight_compander_backward")
def _(
    grads: list[Tensor],
    vs: list[Tensor],
    constants: list[Tensor],
    numbers: list[float],
    a: list[int],
    b: list[int],
    kind: int,
    needs_grad: list[int],
) -> list[Tensor]:
    wanted = [tensor for tensor, flag in zip((*vs, *constants), needs_grad, strict=True) if flag]
    results = [_empty_in_order_of(tensor) for tensor in wanted[: sum(map(bool, needs_grad[: len(vs)]))]]
    return results + [torch.empty(c.shape, dtype=c.dtype, device=c.device) for c in wanted[len(results) :]]


@_library.fake("to_weight_gradients_")
@_library.fake("rescale_steps_")
def _(*_: Any) -> None:
    return None


# ---- batching ----


def _refuse_vmap(name: str) -> None:
    @_library.vmap(name)
    def _(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            f"{name}: vmap over the operator is not supported; pyreg.functional.weight_compander can be mapped"
        )


for _name in ("weight_compander", "weight_compander_backward", "to_weight_gradients_", "rescale_steps_"):
    _refuse_vmap(_name)
