"""The weight compander, its inverse, and OrthoGrad's projection."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyreg import functional as F
from pyreg.ops.weight_compander import rescale_steps_, to_weight_gradients_
from pyreg.optim import orthogonalize_gradients_
from pyreg.reference import orthograd as orthograd_reference
from pyreg.reference import weight_compander as reference
from tests.fuzz.agreement import assert_agrees
from tests.fuzz.tensors import FINITE, VALUES, Recipe, dtypes, recipes, seeds, shapes

KINDS = ("arctan", "arsinh", "erf")
CONSTANTS = ("number", "one", "one in [1]", "rows", "rows in [C, 1]")
_FINITE_AND_HUGE = (*FINITE, "huge")


def _constant(form: str, v: Recipe, sign: float, seed: int) -> Tensor:
    """a or b: between a third and 3, or over many orders of magnitude."""
    rows = v.shape[0] if v.shape and form.startswith("rows") else 1
    generator = torch.Generator().manual_seed(seed)
    spread = 3.0 if seed % 2 else 1000.0
    values = sign * spread ** (2 * torch.rand(rows, generator=generator, dtype=torch.float64) - 1)
    if form.endswith("[C, 1]") and v.shape:
        return values.reshape(-1, *[1] * (len(v.shape) - 1))
    return values if form == "one in [1]" or (form.startswith("rows") and v.shape) else values.reshape(())


@given(
    v=recipes(shapes(0, 4)),
    forms=st.tuples(*[st.sampled_from(CONSTANTS)] * 2),
    signs=st.tuples(*[st.sampled_from([1.0, -1.0])] * 2),
    constants_in=dtypes(),
    kind=st.sampled_from(KINDS),
    trained=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=seeds(),
)
def test_weight_compander(
    v: Recipe,
    forms: tuple[str, str],
    signs: tuple[float, float],
    constants_in: torch.dtype,
    kind: str,
    trained: tuple[bool, bool, bool],
    seed: int,
) -> None:
    x = v.build()
    a, b = (_constant(forms[k], v, signs[k], seed + k).to(constants_in) for k in (0, 1))
    numbers = [form == "number" for form in forms]
    compute = torch.promote_types(v.dtype, torch.float32)

    def with_numbers(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return function(x, a.item() if numbers[0] else a, b.item() if numbers[1] else b, kind)

        return call

    def definition(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = with_numbers(reference.weight_compander)(x, a, b)
        return result

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return with_numbers(reference.weight_compander)(x.to(compute), a, b).to(v.dtype)

    of = [trained[0], trained[1] and not numbers[0], trained[2] and not numbers[1]]
    # Sums over elements cancel, of terms up to |a| largest f.
    scale = 2.0 * math.sqrt(max(x.numel(), 1))
    assert_agrees(
        with_numbers(F.weight_compander),
        definition,
        [x, a, b],
        of,
        seed=seed,
        plain=plain,
        scale=scale if any(of[1:]) else 0.0,
        nan_must_stay=v.values not in ("inf", "-inf", "all -inf"),
        compute=max((v.dtype, constants_in), key=lambda dtype: torch.finfo(dtype).eps),
    )


@given(
    v=recipes(shapes(0, 3), values=("normal", "integers", "zeros", "tiny", "wide")),
    a=st.sampled_from([1.0, -0.3, 20.0]),
    b=st.sampled_from([1.0, -0.3, 20.0]),
    kind=st.sampled_from(KINDS),
    clamp=st.booleans(),
)
def test_inverse_gives_the_weight_again(v: Recipe, a: float, b: float, kind: str, clamp: bool) -> None:
    x = v.build()
    w = F.weight_compander(x, a, b, kind)
    if not clamp:
        limit = (
            {"arctan": math.pi / 2, "erf": 1.0, "arsinh": math.inf}[kind] * abs(a) * (1 - 16 * torch.finfo(w.dtype).eps)
        )
        w = w.clamp(-limit, limit)
    inverse = F.weight_compander_inverse(w, a, b, kind, clamp=clamp)
    assert inverse.isfinite().all()
    again = F.weight_compander(inverse, a, b, kind)
    slack = (
        8
        * torch.finfo(w.dtype).eps
        * (w.double().abs().nan_to_num() * max(1.0, math.log(1 / torch.finfo(w.dtype).eps)) + 0)
    )
    assert ((again.double() - w.double()).abs() <= slack + torch.finfo(w.dtype).tiny * 4 * abs(a / b)).all()


@given(
    vs=st.lists(
        recipes(shapes(0, 3), values=(*FINITE, "huge"), layouts=("contiguous", "reversed", "sliced", "inner")),
        min_size=1,
        max_size=4,
    ),
    gradients=st.sampled_from(VALUES),
    kind=st.sampled_from(KINDS),
    decay=st.sampled_from([0.0, 0.1, -0.1, 1e30]),
    decay_on=st.sampled_from(["w", "v"]),
    seed=seeds(),
)
def test_steps_of_the_companded_optimizer(
    vs: list[Recipe], gradients: str, kind: str, decay: float, decay_on: str, seed: int
) -> None:
    a = [_constant("rows" if v.shape else "one", v, 1.0, seed).to(v.dtype) for v in vs]
    b = [_constant("one", v, 1.0, seed + 1).item() for v in vs]
    tensors = [v.build() for v in vs]
    grads = [v.of(values=gradients, seed=v.seed + 1).build() for v in vs]
    fused = [grad.clone() for grad in grads]
    to_weight_gradients_(fused, tensors, a, b, kind, decay, decay_on)
    for v, grad, own, c, d in zip(tensors, grads, fused, a, b, strict=True):
        expected, plain = grad.double(), grad.clone()
        reference.to_weight_gradient_(expected, v.double(), c.double(), d, kind, decay, decay_on)
        reference.to_weight_gradient_(plain, v, c, d, kind, decay, decay_on)
        # Of what the reference bounds by float64's largest number, the dtype's; where the slope underflows, nothing.
        largest = torch.finfo(v.dtype).max
        slope = reference.slope(v, c, d, kind).double()
        exact = reference.slope(v.double(), c.double(), d, kind)
        certain = ((slope - exact).abs() <= 1e-3 * exact) & grad.isfinite()
        expected = expected.clamp(-largest, largest)
        error = (own.double() - expected).abs()
        assert own[grad.isfinite()].isfinite().all()
        limit = (
            4 * (plain.double() - expected).abs()
            + 256 * torch.finfo(v.dtype).eps * expected.abs()
            + 8 * torch.finfo(v.dtype).tiny
        )
        # A term may cancel the other.
        u = (v.double() / d).square().nan_to_num().clamp(max=1e6)  # exp(-u^2) multiplies the roundings of u
        limit += 8 * torch.finfo(v.dtype).eps * u * expected.abs()
        limit += 64 * torch.finfo(torch.promote_types(v.dtype, torch.float32)).eps * 2 * abs(decay) * 100
        assert (error <= limit)[certain].all(), f"{error[certain].max()}"

    old = [v.of(seed=v.seed + 2).build() for v in vs]
    moved = [tensor.clone() for tensor in tensors]
    rescale_steps_(moved, old, a, b, kind)
    for v, before, own, c, d in zip(tensors, old, moved, a, b, strict=True):
        expected, plain = v.double(), v.clone()
        reference.rescale_step_(expected, before.double(), c.double(), d, kind)
        reference.rescale_step_(plain, before, c, d, kind)
        numbers = expected.abs() < torch.finfo(v.dtype).max / 4
        error = (own.double() - expected).abs()[numbers]
        step = (v.double() - before.double()).abs() * reference.slope(before.double(), c.double(), d, kind)
        squares = (before.double() / d).square().clamp(max=1e6)  # exp(-u^2) multiplies the roundings of u
        sizes = (before.double().abs() + step * (1 + squares))[numbers]
        limit = (
            2 * (plain.double() - expected).abs()[numbers]
            + 32 * torch.finfo(v.dtype).eps * sizes
            + torch.finfo(v.dtype).tiny
        )
        assert (error <= limit).all()


@given(
    params=st.lists(recipes(shapes(0, 4), values=_FINITE_AND_HUGE), min_size=0, max_size=5),
    grads=st.lists(st.sampled_from(_FINITE_AND_HUGE), min_size=5, max_size=5),
    layouts=st.lists(
        st.sampled_from(("contiguous", "reversed", "sliced", "inner", "expanded")), min_size=5, max_size=5
    ),
)
def test_orthogonalize_gradients(params: list[Recipe], grads: list[str], layouts: list[str]) -> None:
    tensors = [param.build().contiguous().requires_grad_() for param in params]
    given_grads = []
    for param, tensor, values, layout in zip(params, tensors, grads, layouts, strict=False):
        grad = param.of(values=values, layout=layout, seed=param.seed + 7).build()
        tensor.grad = grad
        given_grads.append(grad.clone())
    weights_before = [tensor.detach().clone() for tensor in tensors]
    orthogonalize_gradients_(tensors)
    for tensor, grad, weight in zip(tensors, given_grads, weights_before, strict=True):
        torch.testing.assert_close(tensor.detach(), weight, rtol=0, atol=0)
        own = tensor.grad
        assert own is not None
        assert own.shape == grad.shape
        if grad.numel() == 0:
            continue
        w, g = weight.double(), grad.double()
        norm = g.norm()
        perpendicular = g - (w.flatten().dot(g.flatten()) / (w.flatten().dot(w.flatten()) + 1e-30)) * w
        if not perpendicular.isfinite().all() or perpendicular.norm() < 1e-5 * norm or norm * 1e-30 > 1:
            continue  # parallel but for rounding, or beyond what float64's squares hold
        # Weights whose squares are 0 leave a gradient as it is, be it so short that 1e-30 counts beside it.
        expected = orthograd_reference.orthogonalize_gradient(w, g) if w.square().sum() > 0 else g
        eps = torch.finfo(grad.dtype).eps
        if expected.abs().max() > torch.finfo(grad.dtype).max / 2:
            continue
        assert own.isfinite().all(), "not finite where the reference is"
        limit = 4 * eps * norm + 8 * torch.finfo(grad.dtype).tiny * math.sqrt(grad.numel())
        limit = limit + 1e-9 * norm  # what float64 loses where the gradient is almost parallel
        assert (own.double() - expected).norm() <= limit, f"{(own.double() - expected).norm()} of {norm}"
