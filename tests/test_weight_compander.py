"""The weight compander: operators against the reference and other algebra, and all that torch does with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

from pyreg.functional import weight_compander, weight_compander_inverse
from pyreg.ops import _library
from pyreg.ops.weight_compander import KINDS, rescale_steps_, to_weight_gradients_, weight_companders
from pyreg.reference import weight_compander as reference
from tests.oracle import FLOAT_DTYPES, ROUNDOFF, assert_as_accurate, relative_error

INF = math.inf
PART, SHORT_ROW = 16384, 2048  # csrc/weight_compander/weight_compander.h

# Around lanes of a SIMD vector, packs of 16 bytes, a warp, a block of threads, a part; primes; several dimensions.
SHAPES = [
    (), (1,), (2,), (3,), (7,), (8,), (15,), (17,), (33,), (113,), (257,), (5, 3), (2, 3, 4), (8, 3, 7, 7), (PART - 1,),
    (PART + 1,), (2 * PART + 1031,),
]  # fmt: skip
# Rows of one value of a and b each: one element, a few, more than a lane's or a warp's share, just short, long, several
# parts; more rows than a block of threads.
ROW_SHAPES = [(1, 5), (3, 1), (5,), (4, 3, 3, 3), (7, 33), (300, 17), (2, SHORT_ROW), (3, SHORT_ROW + 1), (2, PART + 7)]
ids = lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None  # noqa: E731

Shape = tuple[int, ...]
Constant = Tensor | float


def values(shape: Shape, dtype: torch.dtype, device: torch.device, scale: float = 1.5) -> Tensor:
    """Both sides of |u| = 1, where arctan changes its formula."""
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype).to(device)


def constants(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """a in [0.5, 1.5] and b of both signs, |b| in [0.5, 1.5]."""
    a, b = 0.5 + torch.rand((2, *shape), dtype=torch.float64)
    return a.to(dtype).to(device), (b * (torch.rand(shape) - 0.3).sign()).to(dtype).to(device)


def upstream_of(w: Tensor) -> Tensor:
    """An uneven upstream gradient, the same for every w of a shape and dtype."""
    generator = torch.Generator().manual_seed(1)
    return (0.5 + torch.randn(w.shape, generator=generator, dtype=torch.float64)).to(w)


def w_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """w and the gradients of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    w = function(*leaves)
    return [w.detach(), *torch.autograd.grad(w, leaves, upstream_of(w))]


def assert_all_as_accurate(kind: str, v: Tensor, a: Tensor, b: Tensor) -> None:
    """w and dv by the oracle. da and db are sums that may cancel: 5 roundings of each of their terms, one of the sum;
    exp(-u^2) multiplies the 5 roundings of u^2 by u^2."""
    ours = w_and_gradients(lambda *x: weight_compander(*x, kind), v, a, b)
    plain = w_and_gradients(lambda *x: reference.weight_compander(*x, kind), v, a, b)
    x, a64, b64 = reference.computed(v, a, b, torch.float64)
    g = upstream_of(v).double()
    w, p = a64 * reference.FUNCTION[kind](x / b64), a64 / b64 * reference.DERIVATIVE[kind](x / b64)
    assert_as_accurate(ours[0], plain[0], w, floor=3)
    assert_as_accurate(ours[1], plain[1], g * p, floor=5)
    unit = ROUNDOFF[_library.accumulate_dtype(v.dtype)]
    for actual, terms, constant in ((ours[2], g * w / a64, a), (ours[3], -g * p * x / b64, b)):
        assert actual.dtype == constant.dtype
        assert actual.shape == constant.shape
        rows = terms.reshape(constant.numel(), -1)
        error = (actual.double().flatten() - rows.sum(1)).abs()
        roundings = 5 + (5 * (x / b64).square() if kind == "erf" else torch.zeros_like(x))
        slack = unit * (roundings * terms.abs()).reshape(rows.shape).sum(1)
        rounded = rows.sum(1).abs().clamp_min(torch.finfo(actual.dtype).tiny)
        assert (error <= slack + ROUNDOFF[actual.dtype] * rounded).all()


# ---- right, in every dtype and shape ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_against_reference(device: torch.device, kind: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_all_as_accurate(kind, values(shape, dtype, device), *constants((), dtype, device))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_against_reference(device: torch.device, kind: str, shape: Shape, dtype: torch.dtype) -> None:
    v = values(shape, dtype, device)
    a, b = constants(shape[:1], dtype, device)
    assert_all_as_accurate(kind, v, a, b)
    column = (shape[0], *[1] * (len(shape) - 1))
    assert_all_as_accurate(kind, v, a.reshape(column), b[:1])
    assert_all_as_accurate(kind, v, a[0], b.reshape(column))


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_channels(device: torch.device, kind: str) -> None:
    v = values((3001, 5), torch.float32, device)
    assert_all_as_accurate(kind, v, *constants((3001,), torch.float32, device))


def complex_step(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """df/dx of an analytic elementwise function for each of its inputs, without differences: Im f(x + ih) / h."""
    h = 1e-30
    return [
        function(*(torch.complex(x, torch.full_like(x, h)) if i == j else x + 0j for j, x in enumerate(inputs))).imag
        / h
        for i in range(len(inputs))
    ]


def arctan_by_halving(z: Tensor) -> Tensor:
    """atan z = 2 atan(z / (1 + sqrt(1 + z^2))) five times, then z - z^3/3 + z^5/5 - ..."""
    for _ in range(5):
        z = z / (1 + torch.sqrt(1 + z * z))
    series = torch.zeros_like(z)
    for n in range(8, -1, -1):
        series = 1 / (2 * n + 1) - z * z * series
    return 32 * z * series


def arsinh_by_logarithm(z: Tensor) -> Tensor:
    """asinh z = log(z + sqrt(z^2 + 1)); for Re z < 0 minus that of -z, which does not cancel."""
    sign = torch.where(z.real < 0, -1.0, 1.0)
    return sign * torch.log(sign * z + torch.sqrt(z * z + 1))


def erf_by_series(z: Tensor) -> Tensor:
    """erf z = 2/sqrt(pi) exp(-z^2) sum_n 2^n z^(2n+1) / (2n+1)!!, all terms of one sign on the real axis."""
    term, total = z, z
    for n in range(1, 140):
        term = term * (2 * z * z / (2 * n + 1))
        total = total + term
    return 2 / math.sqrt(math.pi) * torch.exp(-z * z) * total


OTHER_ALGEBRA = {"arctan": arctan_by_halving, "arsinh": arsinh_by_logarithm, "erf": erf_by_series}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_row", [False, True])
def test_against_complex_steps_of_other_formulas(device: torch.device, kind: str, by_row: bool) -> None:
    """float64 truth: the functions by other formulas, their derivatives by a step into the complex plane."""
    v = values((6, 50), torch.float64, device)
    a, b = constants((6, 1) if by_row else (), torch.float64, device)
    w, dv, da, db = w_and_gradients(lambda *x: weight_compander(*x, kind), v, a, b)
    upstream = upstream_of(v)
    inputs = [x.detach().expand(v.shape).clone() for x in (v, a, b)]
    formula = lambda v, a, b: a * OTHER_ALGEBRA[kind](v / b)  # noqa: E731
    by_v, by_a, by_b = (upstream * step for step in complex_step(formula, *inputs))
    truth = [formula(*(x + 0j for x in inputs)).real, by_v, by_a.sum_to_size(a.shape), by_b.sum_to_size(a.shape)]
    for actual, exact in zip((w, dv, da, db), truth, strict=True):
        assert relative_error(actual, exact) <= 1e-13


def ulps(actual: Tensor, exact: Tensor) -> Tensor:
    """The error in units of the last place of float32, in which the exact value lies."""
    exponent = torch.frexp(exact.abs()).exponent.clamp_min(-125)
    return (actual.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 24)


# The emulation of CUDA has the functions of this machine's libm: it would say nothing about a GPU's.
@pytest.mark.large
@pytest.mark.parametrize("kind", KINDS)
def test_function_over_the_whole_range_of_float32(device: torch.device, kind: str) -> None:
    """a = b = 1 leaves the bare function: within 2 units in the last place for every 9973rd float of either sign, and
    in the neighbourhood of each formula's end. CUDA's own functions are documented with up to 4."""
    bits = torch.arange(0, 0x7F800000, 9973, dtype=torch.int32)
    near = torch.tensor([0.84375, 1.0, 4.0, 2.0**30, 88.7])[:, None] * (1 + torch.arange(-500, 500) * 2.0**-23)
    x = torch.cat([bits.view(torch.float32), near.flatten()]).to(device)
    exact = reference.FUNCTION[kind](x.double())
    for sign in (1, -1):
        w = weight_compander(sign * x, 1.0, 1.0, kind)
        error = ulps(w, sign * exact)
        worst = int(error.argmax())
        assert error[worst] <= (4 if device.type == "cuda" else 2), f"{error[worst].item()} ulp at {x[worst].item()}"


@pytest.mark.large
def test_slopes_over_the_whole_range_of_float32(device: torch.device) -> None:
    """f' of arctan and arsinh within a few roundings; that of erf within what rounding u^2 leaves, u^2 roundings."""
    x = torch.arange(0, 0x7F800000, 9973, dtype=torch.int32).view(torch.float32).to(device).requires_grad_()
    y = x.detach().double()
    exact = {"arctan": 1 / (1 + y * y), "arsinh": 1 / torch.sqrt(1 + y * y), "erf": reference.DERIVATIVE["erf"](y)}
    for kind in KINDS:
        (slope,) = torch.autograd.grad(weight_compander(x, 1.0, 1.0, kind).sum(), x)
        normal = exact[kind] > torch.finfo(torch.float32).tiny
        error = ((slope - exact[kind]) / exact[kind])[normal].abs() * 2**24
        limit = 6 + (2 * y[normal] ** 2 if kind == "erf" else 0)
        assert (error <= limit).all(), kind
        assert (slope[~normal].abs() <= 2 * torch.finfo(torch.float32).tiny).all(), kind


# ---- derivatives ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_row", [False, True])
def test_gradcheck_to_second_order(device: torch.device, kind: str, by_row: bool) -> None:
    v = values((4, 3), torch.float64, device).requires_grad_()
    a, b = (x.requires_grad_() for x in constants((4,) if by_row else (), torch.float64, device))
    function = lambda *x: weight_compander(*x, kind)  # noqa: E731
    assert torch.autograd.gradcheck(function, (v, a, b))
    assert torch.autograd.gradgradcheck(function, (v, a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_is_the_same_under_create_graph(device: torch.device, kind: str) -> None:
    inputs = [
        x.requires_grad_() for x in (values((5, 7), torch.float64, device), *constants((5,), torch.float64, device))
    ]
    w = weight_compander(*inputs, kind)
    plain = torch.autograd.grad(w.square().sum(), inputs, retain_graph=True)
    graph = torch.autograd.grad(w.square().sum(), inputs, create_graph=True)
    for one, other in zip(plain, graph, strict=True):
        assert other.requires_grad
        assert relative_error(one, other) <= 1e-14


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_selection_of_gradients(device: torch.device, wanted: Sequence[int], dtype: torch.dtype) -> None:
    inputs = [values((7, 300), dtype, device), *constants((7,), dtype, device)]
    every = w_and_gradients(lambda *x: weight_compander(*x, "arctan"), *inputs)[1:]

    def some(*leaves: Tensor) -> Tensor:
        arguments = list(inputs)
        for i, leaf in zip(wanted, leaves, strict=True):
            arguments[i] = leaf
        return weight_compander(*arguments, "arctan")

    gradients = w_and_gradients(some, *(inputs[i] for i in wanted))[1:]
    assert all(torch.equal(gradient, every[i]) for i, gradient in zip(wanted, gradients, strict=True))


def test_nothing_but_the_inputs_is_saved(device: torch.device) -> None:
    inputs = [
        x.requires_grad_() for x in (values((5, 7), torch.float32, device), *constants((5,), torch.float32, device))
    ]
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        weight_compander(*inputs)
    assert [x.data_ptr() for x in packed] == [x.data_ptr() for x in inputs]


def test_a_changed_input_is_noticed_in_the_backward_pass(device: torch.device) -> None:
    v = values((5,), torch.float32, device).requires_grad_()
    w = weight_compander(v, 0.5, 1.0)
    with torch.no_grad():
        v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.sum().backward()


# ---- edges ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("b", [1.0, -2.0])
def test_huge_and_infinite_values(device: torch.device, kind: str, dtype: torch.dtype, b: float) -> None:
    largest = torch.finfo(dtype).max
    v = torch.tensor([-INF, -largest, largest, INF, 0.0], dtype=dtype, device=device).requires_grad_()
    a, b_ = (torch.tensor(x, dtype=dtype, device=device, requires_grad=True) for x in (0.5, b))
    w = weight_compander(v, a, b_, kind)
    dv, da, db = torch.autograd.grad(w, (v, a, b_), torch.tensor([1.0, 1, 1, 2, 1], dtype=dtype, device=device))
    assert torch.equal(dv[[0, 3]], torch.zeros(2, dtype=dtype, device=device))
    slope = {"arctan": 1.0, "arsinh": 1.0, "erf": 2 / math.sqrt(math.pi)}[kind] * 0.5 / b
    torch.testing.assert_close(dv[4], torch.tensor(slope, dtype=dtype, device=device))
    assert dv.isfinite().all()
    assert torch.equal(w[0].signbit(), torch.tensor(b > 0, device=device))
    if kind == "arsinh":
        assert w[0].isinf()
        assert w[1].isfinite() or dtype == torch.float16
        # u f'(u) is 1 or -1 in each: what remains is the 2 - 1 of the upstream gradient
        torch.testing.assert_close(db, torch.tensor(-0.5 / abs(b), dtype=dtype, device=device))
    else:
        limit = 0.5 * (math.pi / 2 if kind == "arctan" else 1.0)
        torch.testing.assert_close(w[:4].abs(), torch.full((4,), limit, dtype=dtype, device=device))
        torch.testing.assert_close(da, torch.tensor(math.copysign(limit / 0.5, b), dtype=dtype, device=device))
        assert db.abs() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_where_it_is(device: torch.device, kind: str) -> None:
    v = values((40,), torch.float32, device)
    v[17] = math.nan
    w = weight_compander(v, 0.5, 1.0, kind)
    assert w.isnan().nonzero().flatten().tolist() == [17]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_keep_their_sign(device: torch.device, kind: str) -> None:
    v = torch.tensor([0.0, -0.0], device=device)
    w = weight_compander(v, 0.5, 1.0, kind)
    assert not w.any()
    assert w.signbit().tolist() == [False, True]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=ids)
def test_empty(device: torch.device, shape: Shape) -> None:
    v = torch.empty(shape, device=device).requires_grad_()
    for constant_shape in ((), shape[:1]):
        a, b = (x.requires_grad_() for x in constants(constant_shape, torch.float32, device))
        w = weight_compander(v, a, b)
        for create_graph in (False, True):
            upstream = torch.empty(shape, device=device)
            dv, da, db = torch.autograd.grad(w, (v, a, b), upstream, retain_graph=True, create_graph=create_graph)
            assert w.shape == dv.shape == shape
            assert da.shape == db.shape == constant_shape
            assert not da.any()
            assert not db.any()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def with_gaps(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape, 2), 7.0, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 3).clone(memory_format=torch.contiguous_format).transpose(0, 3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.clone,
    "channels_last": channels_last,
    "transposed": transposed,
    "gaps": with_gaps,
    "expanded": lambda x: x[:1].expand(x.shape),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "transposed", "gaps", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device: torch.device, layout: str, grad_layout: str, by_row: bool) -> None:
    v = LAYOUTS[layout](values((6, 5, 3, 4), torch.float64, device))
    g = LAYOUTS[grad_layout](values((6, 5, 3, 4), torch.float64, device))
    a, b = constants((6,) if by_row else (), torch.float64, device)
    results = []
    for function in (weight_compander, reference.weight_compander):
        leaves = [x.detach().requires_grad_() for x in (v, a, b)]
        w = function(*leaves)
        results.append([w.detach(), *torch.autograd.grad(w, leaves, g)])
    if layout in ("contiguous", "channels_last", "transposed", "offset"):
        assert results[0][0].stride() == v.stride()
    else:
        assert results[0][0].is_contiguous()
    for actual, truth in zip(*results, strict=True):
        assert relative_error(actual, truth) <= 1e-12


@pytest.mark.large
def test_same_bits_for_any_number_of_threads(device: torch.device) -> None:
    shapes = [(5,), (1000, 3), (64, 1031), (1_000_003,), (3, 100_003), (2, 2)]
    vs = [values(shape, torch.float32, device).requires_grad_() for shape in shapes]
    pairs = [constants((shape[0],) if i % 2 else (), torch.float32, device) for i, shape in enumerate(shapes)]
    a, b = ([pair[i].requires_grad_() for pair in pairs] for i in (0, 1))
    grads = [values(shape, torch.float32, device) for shape in shapes]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            ws = weight_companders(vs, a, b, "arctan")
            results.append([*ws, *torch.autograd.grad(ws, vs + a + b, grads)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


# ---- lists of tensors ----


def model(device: torch.device) -> tuple[list[Tensor], list[Constant], list[Constant]]:
    """Tensors of all dtypes and sizes with numbers, single values and rows as a and b."""
    shapes = [(7,), (4, PART + 3), (0, 2), (33, 5), (12, 3, 3, 3), ()]
    vs = [values(shape, dtype, device) for dtype in FLOAT_DTYPES for shape in shapes]
    a: list[Constant] = []
    b: list[Constant] = []
    for i, v in enumerate(vs):
        one, row = constants((), v.dtype, device), constants(v.shape[:1], torch.float32, device)
        choices: list[tuple[Constant, Constant]] = [(0.7, -1.2), one, row if v.numel() > 0 else one, (one[0], 2)]
        a.append(choices[i % 4][0])
        b.append(choices[i % 4][1])
    return vs, a, b


def leaves_of(constants: Sequence[Constant]) -> list[Tensor]:
    return [c.requires_grad_() for c in constants if isinstance(c, Tensor)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_the_bits_of_its_tensors_alone(device: torch.device, kind: str) -> None:
    vs, a, b = model(device)
    leaves = [v.requires_grad_() for v in vs] + leaves_of(a) + leaves_of(b)
    grads = [torch.randn_like(v) for v in vs]
    ws = weight_companders(vs, a, b, kind)
    alone = [weight_compander(*one, kind) for one in zip(vs, a, b, strict=True)]
    assert all(torch.equal(w, one) for w, one in zip(ws, alone, strict=True))
    together = torch.autograd.grad(ws, leaves, grads)
    one_by_one = torch.autograd.grad(alone, leaves, grads)
    for gradient, single, leaf in zip(together, one_by_one, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert torch.equal(gradient, single)


def test_shared_constants_are_rounded_once_under_create_graph(device: torch.device) -> None:
    """What two weights give to a bfloat16 constant cancels but for a 1000th, which a sum in bfloat16 loses."""
    v = values((1000,), torch.float32, device)
    vs = [v.clone().requires_grad_(), v.clone().requires_grad_()]
    a = torch.tensor(0.5, device=device, dtype=torch.bfloat16, requires_grad=True)
    grads = [v.clone(), -0.999 * v]
    first, graph = (
        torch.autograd.grad(weight_companders(vs, [a, a], [1.0, 1.0]), a, grads, create_graph=create_graph)[0]
        for create_graph in (False, True)
    )
    truth = 0.001 * (v.double() * v.double().atan()).sum()
    assert relative_error(first, truth) <= 2 * ROUNDOFF[torch.bfloat16]
    assert relative_error(graph, truth) <= 2 * ROUNDOFF[torch.bfloat16]


@pytest.mark.parametrize("shape", [(), (9,)], ids=ids)
def test_shared_constants_get_their_whole_gradient(device: torch.device, shape: Shape) -> None:
    """One tensor as a of some, b of others, and both of one; the truth is autograd's sum in float64."""
    vs = [values((9, n), torch.float32, device) for n in (5, 2000, PART + 1)]
    shared, other = (x.requires_grad_() for x in constants(shape, torch.float32, device))
    a, b = [shared, other, shared], [other, shared, shared]
    grads = [torch.randn_like(v) for v in vs]
    for v in vs:
        v.requires_grad_()
    ours = torch.autograd.grad(weight_companders(vs, a, b), [*vs, shared, other], grads)
    twin = [x.detach().double().requires_grad_() for x in (*vs, shared, other)]
    of = {id(shared): twin[3], id(other): twin[4]}
    ws = [reference.weight_compander(v, of[id(x)], of[id(y)]) for v, x, y in zip(twin, a, b, strict=False)]
    truth = torch.autograd.grad(ws, twin, [g.double() for g in grads])
    for actual, exact in zip(ours, truth, strict=True):
        assert relative_error(actual, exact) <= 8 * ROUNDOFF[torch.float32]
    graph = torch.autograd.grad(weight_companders(vs, a, b), [*vs, shared, other], grads, create_graph=True)
    for actual, exact in zip(graph, truth, strict=True):
        assert relative_error(actual, exact) <= 32 * ROUNDOFF[torch.float32]


@pytest.mark.parametrize("count", [360, 361, 1100])
def test_more_tensors_than_a_kernel_parameter_holds(device: torch.device, count: int) -> None:
    dtypes = (torch.float32, torch.float64)
    vs = [values((2 + i % 5,), dtypes[i % 7 == 0], device).abs().requires_grad_() for i in range(count)]
    a, b = (x.requires_grad_() for x in constants((), torch.float64, device))
    own = [constants((), torch.float64, device)[0].requires_grad_() for _ in range(count)]
    grads = [torch.rand_like(v) for v in vs]  # all of one sign: no sum cancels
    half = count // 2
    constants_a, constants_b = own[:half] + [a] * (count - half), [b] * count
    ws = weight_companders(vs, constants_a, constants_b)
    leaves = [*vs, *own[:half], a, b]
    gradients = torch.autograd.grad(ws, leaves, grads)
    expected = [reference.weight_compander(*one) for one in zip(vs, constants_a, constants_b, strict=True)]
    truth = torch.autograd.grad(expected, leaves, grads)
    for actual, exact in zip((*ws, *gradients), (*expected, *truth), strict=True):
        assert relative_error(actual, exact) <= 16 * ROUNDOFF[torch.float32]


def test_unused_outputs_and_inputs_that_need_nothing(device: torch.device) -> None:
    vs = [values((5,), torch.float32, device).requires_grad_(i != 1) for i in range(3)]
    a = [torch.tensor(0.5 + i, device=device, requires_grad=True) for i in range(3)]
    ws = weight_companders(vs, a, [1.0] * 3)
    gradients = torch.autograd.grad(ws[1].sum(), [vs[0], vs[2], *a], allow_unused=True, retain_graph=True)
    assert [gradient is None for gradient in gradients] == [True, True, True, False, True]
    torch.testing.assert_close(gradients[3], torch.atan(vs[1]).sum())
    (ws[0].sum() + ws[2].sum()).backward()
    assert a[1].grad is None
    torch.testing.assert_close(a[2].grad, torch.atan(vs[2]).sum().detach())
    torch.testing.assert_close(vs[2].grad, 2.5 / (1 + vs[2].detach() ** 2))


def test_lists_of_nothing(device: torch.device) -> None:
    assert weight_companders([], [], []) == []
    to_weight_gradients_([], [], [], [])
    rescale_steps_([], [], [], [])


# ---- what the optimizer needs ----


@pytest.mark.parametrize("decay_on", ["w", "v"])
@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_the_weights(device: torch.device, kind: str, decay: float, decay_on: str) -> None:
    """Against the gradient of loss + decay by w that autograd gives where w is a leaf."""
    vs, a, b = model(device)
    grads_by_w = [torch.randn_like(v) for v in vs]
    for v in vs:
        v.requires_grad_()
    ws = weight_companders(vs, a, b, kind)
    grads = [g.clone() for g in torch.autograd.grad(ws, vs, grads_by_w)]
    to_weight_gradients_(grads, vs, a, b, kind, decay, decay_on)
    for i, v in enumerate(vs):
        leaf = reference.weight_compander(v.detach().double(), a[i], b[i], kind).requires_grad_()
        slope = reference.slope(v.detach().double(), a[i], b[i], kind)
        loss = (grads_by_w[i].double() * leaf).sum() + decay * (leaf.square().sum() if decay_on == "w" else 0)
        (truth,) = torch.autograd.grad(loss, leaf)
        if decay_on == "v":
            truth = truth + 2 * decay * v.detach().double() / slope
        plain = torch.autograd.grad(reference.weight_compander(v, a[i], b[i], kind), v, grads_by_w[i])[0].clone()
        reference.to_weight_gradient_(plain, v.detach(), a[i], b[i], kind, decay, decay_on)
        # exp(-u^2) multiplies the roundings of u^2 by u^2, which is up to 100 here and largest where 1 / p is
        assert_as_accurate(grads[i], plain, truth, floor=400 if kind == "erf" else 8)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradients_by_the_weights_stay_finite(device: torch.device, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    v = torch.tensor([40.0, 40.0, 40.0, 4.0, 1.0, 1.0, 1.0], dtype=dtype, device=device)
    grad = torch.tensor([0.0, 3.0, -3.0, largest, INF, -INF, math.nan], dtype=dtype, device=device)
    for decay_on in ("w", "v"):
        changed = grad.clone()
        to_weight_gradients_([changed], [v], [0.5], [1.0], "erf", 0.25, decay_on)
        by_decay = 2 * 0.25 * 0.5 if decay_on == "w" else 0.0  # p is 0: w is 0.5, and the decay by v does nothing
        torch.testing.assert_close(changed[:3], torch.full((3,), by_decay, dtype=dtype, device=device))
        assert changed[3] == largest
        torch.testing.assert_close(changed[4:], grad[4:], equal_nan=True)
        plain = grad.clone()
        reference.to_weight_gradient_(plain, v, 0.5, 1.0, "erf", 0.25, decay_on)
        torch.testing.assert_close(changed, plain, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaled_steps(device: torch.device, kind: str) -> None:
    old, a, b = model(device)
    vs = [v + 0.1 * torch.randn_like(v) for v in old]
    plain, truth = [v.clone() for v in vs], [v.double() for v in vs]
    for i, v in enumerate(old):
        reference.rescale_step_(plain[i], v, a[i], b[i], kind)
        reference.rescale_step_(truth[i], v.double(), a[i], b[i], kind)
    rescale_steps_(vs, old, a, b, kind)
    for actual, same_dtype, exact in zip(vs, plain, truth, strict=True):
        assert_as_accurate(actual, same_dtype, exact, floor=4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "gaps"])
@pytest.mark.parametrize("other_layout", ["contiguous", "channels_last", "gaps"])
@pytest.mark.parametrize("by_row", [False, True])
def test_changes_in_place_of_any_strides(device: torch.device, layout: str, other_layout: str, by_row: bool) -> None:
    old = LAYOUTS[other_layout](values((6, 5, 3, 4), torch.float32, device))
    v = LAYOUTS[layout](values((6, 5, 3, 4), torch.float32, device))
    a, b = constants((6,) if by_row else (), torch.float32, device)
    for change, definition in (
        (lambda x: rescale_steps_([x], [old], [a], [b]), lambda x: reference.rescale_step_(x, old, a, b, "arctan")),
        (
            lambda x: to_weight_gradients_([x], [old], [a], [b]),
            lambda x: reference.to_weight_gradient_(x, old, a, b, "arctan"),
        ),
    ):
        expected, strides, address = v.clone(), v.stride(), v.data_ptr()
        definition(expected)
        change(v)
        assert (v.stride(), v.data_ptr()) == (strides, address)
        assert relative_error(v, expected) <= 8 * ROUNDOFF[torch.float32]
        if layout == "gaps":
            assert (v.as_strided(v.shape, strides, 1) == 7).all()


@pytest.mark.parametrize("change", [to_weight_gradients_, rescale_steps_])
def test_changes_in_place_are_new_versions(device: torch.device, change: Callable[..., None]) -> None:
    x, v = values((5,), torch.float32, device), values((5,), torch.float32, device)
    version = x._version
    change([x], [v], [0.5], [1.0])
    assert x._version > version


# ---- the inverse ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_row", [False, True])
def test_inverse(device: torch.device, kind: str, dtype: torch.dtype, by_row: bool) -> None:
    """Psi of the inverse is w to the rounding of v, which the slope makes no larger: f' <= 1.13."""
    a, b = constants((40, 1) if by_row else (), dtype, device)
    limit = {"arctan": math.pi / 2, "arsinh": 3.0, "erf": 1.0}[kind] * a.double().abs()
    w = (limit * torch.linspace(-0.99, 0.99, 50, dtype=torch.float64).to(device).expand(40, 50)).to(dtype)
    v = weight_compander_inverse(w, a, b, kind)
    assert v.dtype == dtype
    exact = {"arctan": torch.tan, "arsinh": torch.sinh, "erf": torch.erfinv}[kind](w.double() / a.double()) * b.double()
    assert relative_error(v, exact) <= 1.01 * ROUNDOFF[dtype] + 1e-15
    back = weight_compander(v, a, b, kind)
    slack = (1.2 * (a / b).abs() * v.abs() + 3 * w.abs()).double() * ROUNDOFF[dtype]
    assert ((back.double() - w.double()).abs() <= slack).all()


@pytest.mark.parametrize("kind", KINDS)
def test_inverse_gradients(device: torch.device, kind: str) -> None:
    a, b = (x.requires_grad_() for x in constants((4,), torch.float64, device))
    w = (0.8 * torch.rand(4, 3, dtype=torch.float64, device=device) * a.detach()[:, None]).requires_grad_()
    function = lambda *x: weight_compander_inverse(*x, kind)  # noqa: E731
    assert torch.autograd.gradcheck(function, (w, a, b))
    assert torch.autograd.gradgradcheck(function, (w, a, b))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("b", [1.0, -0.3, 50.0])
def test_inverse_clamps_to_finite_values(device: torch.device, kind: str, dtype: torch.dtype, b: float) -> None:
    w = torch.tensor([-INF, -9e4, -0.5, -0.1, 0.1, 0.5, 9e4, INF], dtype=dtype, device=device)
    v = weight_compander_inverse(w, 0.5, b, kind, clamp=True)
    assert v.isfinite().all()
    torch.testing.assert_close(v[3:5], weight_compander_inverse(w[3:5], 0.5, b, kind))
    limit = 0.5 * {"arctan": math.pi / 2, "erf": 1.0, "arsinh": INF}[kind]
    back = weight_compander(v, 0.5, b, kind).double()
    if kind != "arsinh":
        clamped = w.double().clamp(-limit, limit)
        assert ((back - clamped).abs() <= 8 * ROUNDOFF[dtype] * limit).all()
    assert weight_compander_inverse(torch.tensor([INF], dtype=dtype), 0.5, b, kind, clamp=True).isfinite()


@pytest.mark.parametrize(
    ("w", "a", "kind", "message"),
    [
        ([0.1, -0.9], 0.5, "arctan", r"pi / 2 = 0.785398 for kind 'arctan', got \|w\| up to 0.9; choose a larger a"),
        ([0.1, 0.5], 0.5, "erf", r"\|w\| < \|a\| = 0.5 for kind 'erf', got \|w\| up to 0.5"),
        ([0.1, -0.6], -0.5, "erf", r"\|w\| < \|a\| = 0.5 for kind 'erf', got \|w\| up to 0.6"),
        ([0.1, INF], 0.5, "arctan", r"got \|w\| up to inf"),
        ([0.1, 60.0], 0.5, "arsinh", r"arsinh\(largest / max.* = 44.\d+ for kind 'arsinh', got \|w\| up to 60"),
        ([0.1, math.nan], 0.5, "arctan", r"expected w without NaN, got 1 in 2 elements"),
        ([0.5, 0.9], [1.0, 0.5], "arctan", r"= 0.785398 for kind 'arctan' in slice 1 of dimension 0, got"),
    ],
)  # fmt: skip
def test_inverse_out_of_range(device: torch.device, w: list[float], a: Any, kind: str, message: str) -> None:
    tensor, scale = torch.tensor(w, device=device), a if isinstance(a, float) else torch.tensor(a, device=device)
    with pytest.raises(
        ValueError, match="weight_compander_inverse: expected .*" + message if "NaN" not in message else message
    ):
        weight_compander_inverse(tensor, scale, 1.0, kind)


def test_inverse_of_nan_is_refused_when_clamping_too(device: torch.device) -> None:
    with pytest.raises(ValueError, match="expected w without NaN"):
        weight_compander_inverse(torch.tensor([math.nan], device=device), 0.5, 1.0, clamp=True)


def test_inverse_of_nothing(device: torch.device) -> None:
    assert weight_compander_inverse(torch.empty(0, 3, device=device), 0.5, 1.0).shape == (0, 3)


# ---- a citizen of torch ----


def test_opcheck(device: torch.device) -> None:
    vs = [values(shape, torch.float32, device).requires_grad_() for shape in ((3, 4), (7,), (0,), ())]
    vs.append(channels_last(values((2, 3, 4, 5), torch.float32, device)).requires_grad_())
    row, one = (constants(shape, torch.float32, device)[0].requires_grad_() for shape in ((3,), ()))
    a, b = [0, -1, 1, 1, -2], [1, 1, -1, 1, 1]
    arguments = (vs, [row, one], [0.5, 2.0], a, b, 0)
    opcheck(torch.ops.pyreg.weight_compander.default, arguments)
    detached = [v.detach() for v in vs]
    others = [torch.randn_like(v) for v in detached]
    constants_ = [row.detach(), one.detach()]
    for needs_grad in ([1, 1, 0, 1, 1, 1, 1], [0] * 5 + [0, 1], [1] * 5 + [0, 0]):
        backward = (others, detached, constants_, *arguments[2:], needs_grad)
        opcheck(torch.ops.pyreg.weight_compander_backward.default, backward)
    to_weight = (others, detached, constants_, *arguments[2:], 0.1, 0.0)
    opcheck(torch.ops.pyreg.to_weight_gradients_.default, to_weight)
    opcheck(torch.ops.pyreg.rescale_steps_.default, (others, detached, constants_, *arguments[2:]))


@pytest.mark.parametrize("numbers", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.needs_compiler)])
def test_compile_fullgraph(device: torch.device, backend: str, numbers: bool) -> None:
    vs = [values(shape, torch.float32, device).requires_grad_() for shape in ((5, 3), (7,))]
    a: list[Constant] = [0.7, 0.7] if numbers else [constants((5,), torch.float32, device)[0].requires_grad_(), 0.7]
    b: list[Constant] = [1.5, -2.0] if numbers else [torch.tensor(1.5, device=device, requires_grad=True)] * 2

    def loss(vs: list[Tensor], a: list[Constant], b: list[Constant]) -> Tensor:
        ws = weight_companders([2 * v for v in vs], a, b)
        return sum(w.square().sum() for w in ws) + weight_compander(vs[0], a[0], b[0], "erf").sum()

    leaves = [*vs, *leaves_of(a), *{id(x): x for x in leaves_of(b)}.values()]
    expected = torch.autograd.grad(loss(vs, a, b), leaves)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(vs, a, b), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_compile_with_changing_numbers(device: torch.device) -> None:
    function = torch.compile(lambda v, a: weight_compander(v, a, 1.0), fullgraph=True, backend="aot_eager")
    v = values((5,), torch.float32, device)
    for a in (0.5, 0.6, 0.7):
        torch.testing.assert_close(function(v, a), weight_compander(v, a, 1.0))


def test_compiled_changes_in_place(device: torch.device) -> None:
    v, g = values((5,), torch.float32, device), values((5,), torch.float32, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def change(g: Tensor, v: Tensor) -> Tensor:
        g = g * 2
        to_weight_gradients_([g], [v], [0.5], [1.0])
        rescale_steps_([g], [v], [0.5], [1.0])
        return g + 1

    expected = g * 2
    reference.to_weight_gradient_(expected, v, 0.5, 1.0, "arctan")
    reference.rescale_step_(expected, v, 0.5, 1.0, "arctan")
    torch.testing.assert_close(change(g, v), expected + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func(device: torch.device, kind: str) -> None:
    """grad, vmap over everything at once (an ensemble of models) and jvp."""
    vs, (a, b) = values((3, 5, 4), torch.float64, device), constants((3, 5), torch.float64, device)
    loss = lambda v, a, b: weight_compander(v, a, b, kind).square().sum()  # noqa: E731
    stacked = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(vs, a, b)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in (vs, a, b)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for ours, truth in zip(stacked, expected, strict=True):
            assert relative_error(ours[i], truth) <= 1e-13
    tangent = torch.ones_like(vs[0])
    function = lambda v: weight_compander(v, a[0], b[0], kind)  # noqa: E731
    _, directional = torch.func.jvp(function, (vs[0],), (tangent,))
    assert relative_error(directional, reference.slope(vs[0], a[0], b[0], kind)) <= 1e-13


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(device: torch.device, kind: str, requires_grad: bool) -> None:
    """Dual numbers outside of torch.func, under no_grad too; the truth is the reverse mode's gradients."""
    primals = values((5, 4), torch.float64, device), *constants((5,), torch.float64, device)
    leaves = [x.clone().requires_grad_() for x in primals]
    tangents = [torch.randn_like(x) for x in primals]
    jacobian = torch.autograd.functional.jacobian(lambda *x: weight_compander(*x, kind), tuple(leaves))
    expected = sum(torch.tensordot(j, t, t.dim()) for j, t in zip(jacobian, tangents, strict=True))
    with forward_ad.dual_level(), torch.set_grad_enabled(requires_grad):
        duals = [
            forward_ad.make_dual(x, t) for x, t in zip(leaves if requires_grad else primals, tangents, strict=True)
        ]
        tangent = forward_ad.unpack_dual(weight_compander(*duals, kind)).tangent
    assert tangent is not None
    assert relative_error(tangent, expected) <= 1e-13


def test_batched_upstream_gradients(device: torch.device) -> None:
    v, a, b = (
        x.requires_grad_() for x in (values((4, 3), torch.float64, device), *constants((4,), torch.float64, device))
    )
    w = weight_compander(v, a, b)
    grads = torch.randn(5, 4, 3, dtype=torch.float64, device=device)
    batched = torch.autograd.grad(w, (v, a, b), grads, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(grads):
        for one, other in zip(batched, torch.autograd.grad(w, (v, a, b), g, retain_graph=True), strict=True):
            assert relative_error(one[i], other) <= 1e-13


@pytest.mark.parametrize("name", ["weight_compander", "rescale_steps_"])
def test_vmap_over_the_operator_is_refused(device: torch.device, name: str) -> None:
    operator = getattr(torch.ops.pyreg, name)
    x = torch.randn(2, 3, device=device)
    call = (
        (lambda v: operator([v], [], [0.5], [-1], [-1], 0)[0])
        if name == "weight_compander"
        else (lambda v: operator([v], [v.clone()], [], [0.5], [-1], [-1], 0))
    )
    with pytest.raises(NotImplementedError, match=f"{name}: vmap over the operator is not supported"):
        torch.vmap(call)(x)


def test_autocast_changes_nothing(device: torch.device) -> None:
    v = values((50,), torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        w = weight_compander(v, 0.5, 1.0)
    assert torch.equal(w, weight_compander(v, 0.5, 1.0))


def test_meta_tensors() -> None:
    v = torch.empty(3, 4, device="meta", requires_grad=True)
    w = weight_compander(v, 0.5, torch.empty(3, device="meta"))
    assert w.shape == (3, 4)
    assert torch.autograd.grad(w.sum(), v)[0].shape == (3, 4)


def test_devices_without_kernels_take_the_reference(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_operator(*_: Any) -> None:
        raise AssertionError("the operator was called")

    monkeypatch.setattr(_library, "has_kernel", lambda tensor: False)
    for name in ("_forward", "_backward", "_to_weight_gradients", "_rescale_steps"):
        monkeypatch.setattr(f"pyreg.ops.weight_compander.{name}", no_operator)
    v, grad = values((5, 3), torch.float32, device), values((5, 3), torch.float32, device)
    expected, step = grad.clone(), grad.clone()
    assert torch.equal(weight_compander(v, 0.5, -1.0, "erf"), reference.weight_compander(v, 0.5, -1.0, "erf"))
    reference.to_weight_gradient_(expected, v, 0.5, -1.0, "erf", 0.1, "v")
    to_weight_gradients_([grad], [v], [0.5], [-1.0], "erf", 0.1, "v")
    assert torch.equal(grad, expected)
    reference.rescale_step_(expected, v, 0.5, -1.0, "erf")
    rescale_steps_([grad], [v], [0.5], [-1.0], "erf")
    assert torch.equal(grad, expected)
    assert not torch.equal(grad, step)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_four_launches_a_step_without_synchronisation() -> None:
    device = torch.device("cuda")
    vs = [values((size, 3), torch.float32, device).requires_grad_() for size in (3, 1000, 100_003) * 60]
    a, b = ([constants((), torch.float32, device)[i].requires_grad_() for _ in vs] for i in (0, 1))
    grads = [torch.randn_like(v) for v in vs]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(weight_companders(vs, a, b), vs + a + b, grads)

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= 4, [kernel.name for kernel in kernels]


# ---- hard to misuse ----


ONES, ONES_2D = torch.ones(3), torch.ones(3, 2)


@pytest.mark.parametrize("function", [weight_compander, weight_compander_inverse])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ONES, 0.5, 1.0, "tanh"), ValueError, "expected kind to be 'arctan', 'arsinh' or 'erf', got 'tanh'"),
        (([1.0], 0.5, 1.0), TypeError, "expected [vw] to be a tensor, got list"),
        ((ONES.long(), 0.5, 1.0), TypeError, r"expected [vw] to be float64, .* got torch.int64; .*float\(\)"),
        ((ONES.cfloat(), 0.5, 1.0), TypeError, "got torch.complex64"),
        ((ONES.to_sparse(), 0.5, 1.0), TypeError, "expected [vw] to be dense, got layout torch.sparse_coo"),
        ((ONES, "0.5", 1.0), TypeError, "expected a to be a number or a tensor, got str"),
        ((ONES, 0.5, True), TypeError, "expected b to be a number or a tensor, got bool"),
        ((ONES, 0, 1.0), ValueError, "expected a to be finite and not 0, got 0; w = a f"),
        ((ONES, 0.5, 0.0), ValueError, "expected b to be finite and not 0, got 0.0"),
        ((ONES, math.nan, 1.0), ValueError, "expected a to be finite and not 0, got nan"),
        ((ONES, 0.5, INF), ValueError, "expected b to be finite and not 0, got inf"),
        ((ONES_2D, torch.ones(2), 1.0), ValueError, r"shape \[\], \[3\] or \[3, 1, ..., 1\] for [vw] of .*, got \[2\]"),
        ((ONES_2D, torch.ones(1, 3), 1.0), ValueError, r"expected a to hold one value, .* got \[1, 3\]"),
        ((ONES_2D, 0.5, ONES_2D), ValueError, r"expected b to hold one value, .* got \[3, 2\]"),
        ((ONES[0], 0.5, torch.ones(2)), ValueError, r"expected b to hold one value, .* \[\] for [vw] of shape \[\]"),
        ((ONES, ONES.int(), 1.0), TypeError, "expected a to be float64, .* got torch.int32"),
        ((ONES, torch.ones((), device="meta"), 1.0), ValueError, "expected a on the device cpu of [vw], got meta"),
        ((ONES, torch.tensor(0.0), 1.0), ValueError, "expected a to be finite and not 0, got 0"),
        ((ONES, torch.tensor([1.0, math.nan, 1]), 1.0), ValueError, "expected a to be finite and not 0, got nan"),
        ((ONES, 0.5, torch.tensor(-INF)), ValueError, "expected b to be finite and not 0, got -inf"),
    ],
)  # fmt: skip
def test_errors(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(*arguments)


def test_errors_name_the_slice(device: torch.device) -> None:
    b = torch.tensor([1.0, 0.0, 1.0], device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"expected b .* got 0 for tensor 0, slice 1 of dimension 0"):
            weight_compander(torch.ones(3, 2, device=device), 0.5, b)


def test_a_b_that_has_no_reciprocal_is_refused(device: torch.device) -> None:
    v = torch.zeros(3, device=device)
    with pytest.raises(ValueError, match="expected b to be finite and not 0, got 1e-4"):
        weight_compander(v, 0.5, 1e-40)
    assert not weight_compander(v.double(), 0.5, 1e-40).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_on_a_gpu_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    v, zero = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")
    assert not weight_compander(v, zero, 1.0).any()
    monkeypatch.setenv("PYREG_CHECKS", "1")
    with pytest.raises(ValueError, match="weight_compander: expected a to be finite and not 0, got 0"):
        weight_compander(v, zero, 1.0)


def test_errors_of_lists(device: torch.device) -> None:
    v = torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"weight_companders: expected a of one item a tensor, 2, got 1"):
        weight_companders([v, v], [0.5], [1.0, 1.0])
    with pytest.raises(TypeError, match=r"weight_companders: expected vs\[1\] to be float64, .* got torch.int64"):
        weight_companders([v, v.long()], [0.5] * 2, [1.0] * 2)
    with pytest.raises(
        ValueError, match=r"weight_companders: expected b\[1\] to hold one value, .* for vs\[1\] of shape"
    ):
        weight_companders([v, v], [0.5] * 2, [1.0, v[:2]])
    with pytest.raises(ValueError, match=r"to_weight_gradients_: expected grads of one item a tensor, 1, got 2"):
        to_weight_gradients_([v, v], [v], [0.5], [1.0])
    with pytest.raises(ValueError, match=r"to_weight_gradients_: expected decay_on to be 'w' or 'v', got 'x'"):
        to_weight_gradients_([v], [v], [0.5], [1.0], decay_on="x")
    with pytest.raises(ValueError, match=r"to_weight_gradients_: expected a finite decay, got nan"):
        to_weight_gradients_([v], [v], [0.5], [1.0], decay=math.nan)
    with pytest.raises(ValueError, match=r"rescale_steps_: expected kind to be .* got 'relu'"):
        rescale_steps_([v], [v], [0.5], [1.0], "relu")


def test_tensors_of_several_devices() -> None:
    vs = [torch.ones(3), torch.empty(4, device="meta"), torch.ones(2)]
    ws = weight_companders(vs, [0.5] * 3, [1.0] * 3)
    assert [(w.shape[0], w.device.type) for w in ws] == [(3, "cpu"), (4, "meta"), (2, "cpu")]
    torch.testing.assert_close(ws[2], 0.5 * torch.atan(vs[2]))


def test_more_slices_than_the_kernels_count_are_refused(device: torch.device) -> None:
    a = torch.full((1,), 0.5, device=device).expand(2**31)
    with pytest.raises(ValueError, match="expected an a or b of at most 2147483647 values, got 2147483648"):
        weight_compander(torch.empty(2**31, 0, device=device), a, 1.0)


def test_direct_calls_of_the_operator_are_checked(device: torch.device) -> None:
    operators = torch.ops.pyreg
    v = torch.ones(3, 2, device=device)
    with pytest.raises(
        ValueError, match="pyreg::weight_compander: expected an a and a b for each of 1 tensors, got 2 and 1"
    ):
        operators.weight_compander([v], [], [0.5], [-1, -1], [-1], 0)
    with pytest.raises(ValueError, match=r"expected kind 0 \(arctan\), 1 \(arsinh\) or 2 \(erf\), got 3"):
        operators.weight_compander([v], [], [0.5], [-1], [-1], 3)
    for place in (-2, 0):
        with pytest.raises(ValueError, match=rf"expected a\[0\] in \[-1, 0\), got {place}"):
            operators.weight_compander([v], [], [0.5], [place], [-1], 0)
    with pytest.raises(ValueError, match="one for each slice of dimension 0, got 2 values"):
        operators.weight_compander([v], [v[0]], [0.5], [0], [-1], 0)
    with pytest.raises(ValueError, match="expected a float64, float32, bfloat16 or float16 tensor, got Long"):
        operators.weight_compander([v.long()], [], [0.5], [-1], [-1], 0)
    with pytest.raises(ValueError, match="expected a gradient for each of 1 tensors and 1 flags, got 1 and 2"):
        operators.weight_compander_backward([v], [v], [], [0.5], [-1], [-1], 0, [1, 1])
    with pytest.raises(ValueError, match=r"expected grads\[0\] of the shape of its v"):
        operators.weight_compander_backward([v[:2]], [v], [], [0.5], [-1], [-1], 0, [1])
    with pytest.raises(ValueError, match=r"expected grads\[0\] of dtype Float as its v, got Double"):
        operators.to_weight_gradients_([v.double()], [v], [], [0.5], [-1], [-1], 0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"expected vs\[0\] to have memory of its own .*; clone it first"):
        operators.rescale_steps_([v[:1].expand(3, 2)], [v], [], [0.5], [-1], [-1], 0)
    with pytest.raises(ValueError, match="expected one old tensor a tensor, got 1 vs and 2 old_vs"):
        operators.rescale_steps_([v], [v, v], [], [0.5], [-1], [-1], 0)
