"""What ConR, SupCon and InfoNCE have in common: dtypes, gradients, memory, and the ways they are used.

What sets them apart is in ``test_conr.py``, ``test_supcon.py`` and ``test_info_nce.py``.
"""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import pyreg
from bench.memory import peak_extra_bytes
from pyreg.ops import _library
from tests.oracle import FLOAT_DTYPES, ROUNDOFF, assert_as_accurate, relative_error
from tests.pairwise import LOSSES, REDUCTIONS, Loss, in_float64, value_and_gradients

pytestmark = pytest.mark.not_emulated

# [N, D]: the fewest rows that make pairs; primes; one feature; tiles and vectors left incomplete; on both sides of the
# 512 rows beyond which ConR puts them in order.
SHAPES = [(2, 3), (3, 1), (37, 19), (129, 64), (257, 5), (513, 33)]
# On both sides of the 1024 rows up to which the gradient is formed with the loss.
LARGE_SHAPES = [(700, 24), (1031, 7)]

# Roundoffs of the terms that a loss and its gradients are differences of: a score, an exponential, two sums.
FLOOR = 4


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Loss:
    return LOSSES[request.param]


def assert_close(actual: Any, expected: Any, dtype: torch.dtype = torch.float64) -> None:
    """The same numbers but for the order of sums, of whose terms some cancel."""
    torch.testing.assert_close(actual, expected, rtol=2**12 * ROUNDOFF[dtype], atol=2**8 * ROUNDOFF[dtype])


# ---- right in every dtype ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_reference(device: torch.device, loss: Loss, shape: tuple[int, int], dtype: torch.dtype) -> None:
    features, arguments = loss.features(shape, dtype, device), loss.arguments(shape[0], device)
    for reduction in REDUCTIONS:
        arguments["reduction"] = reduction
        ours = value_and_gradients(loss.fused, features, **arguments)
        loss.assert_as_accurate(features, arguments, ours, floor=FLOOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_many_tiles_against_reference(
    device: torch.device, loss: Loss, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    features, arguments = loss.features(shape, dtype, device), loss.arguments(shape[0], device)
    loss.assert_as_accurate(features, arguments, value_and_gradients(loss.fused, features, **arguments), floor=FLOOR)


# ---- gradients ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(device: torch.device, loss: Loss, reduction: str) -> None:
    features, arguments = loss.features((7, 3), torch.float64, device), loss.arguments(7, device)
    assert torch.autograd.gradcheck(lambda *f: loss.fused(*f, reduction=reduction, **arguments), features)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradgradcheck(device: torch.device, loss: Loss, reduction: str) -> None:
    features, arguments = loss.features((5, 2), torch.float64, device), loss.arguments(5, device)
    assert torch.autograd.gradgradcheck(lambda *f: loss.fused(*f, reduction=reduction, **arguments), features)


@pytest.mark.parametrize("count", [40, 1030])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_is_asked_for_again(device: torch.device, loss: Loss, reduction: str, count: int) -> None:
    features, arguments = loss.features((count, 6), torch.float64, device), loss.arguments(count, device)
    value = loss.fused(*features, reduction=reduction, **arguments)
    upstream = torch.rand_like(value)
    first = torch.autograd.grad(value, features, upstream, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    again = torch.autograd.grad(value, features, 2 * upstream)
    torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)
    torch.testing.assert_close(again, tuple(2 * gradient for gradient in kept), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_a_batch_of_upstream_gradients(device: torch.device, loss: Loss, reduction: str) -> None:
    features, arguments = loss.features((10, 3), torch.float64, device), loss.arguments(10, device)
    value = loss.fused(*features, reduction=reduction, **arguments)
    upstream = torch.randn(3, *value.shape, dtype=torch.float64, device=device)
    batched = torch.autograd.grad(value, features, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        single = torch.autograd.grad(value, features, upstream[i], retain_graph=True)
        assert_close([gradient[i] for gradient in batched], list(single))


@pytest.mark.parametrize("order", ["first", "second"])
def test_features_that_something_else_is_made_of(device: torch.device, loss: Loss, order: str) -> None:
    """Each way to a tensor counts once."""
    (x, *_), arguments = loss.features((9, 4), torch.float64, device), loss.arguments(9, device)

    def value(f: Any, x: Tensor) -> Tensor:
        return f(*[x * x[0], x.sin() + x][: loss.trained], **arguments)

    expected, actual, functional = (
        torch.autograd.grad(value(loss.reference, x), x, create_graph=True)[0],
        torch.autograd.grad(value(loss.fused, x), x, create_graph=True)[0],
        torch.func.grad(lambda x: value(loss.fused, x))(x.detach()),
    )
    if order == "first":
        assert_close(actual, expected)
        assert_close(functional, expected.detach())
    else:
        assert_close(*(torch.autograd.grad(g.square().sum(), x) for g in (actual, expected)))


@pytest.mark.parametrize("count", [10, 1030])
def test_features_changed_between_forward_and_backward_are_an_error(
    device: torch.device, loss: Loss, count: int
) -> None:
    features, arguments = loss.features((count, 3), torch.float32, device), loss.arguments(count, device)
    changed = [tensor * 1 for tensor in features]
    value = loss.fused(*changed, **arguments)
    changed[-1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("count", [300, 1100])
def test_float16_gradients_wait_for_the_loss_scale(device: torch.device, loss: Loss, count: int) -> None:
    """Without the scale most of these gradients are below the smallest float16."""
    scale = 2.0**15
    features, arguments = loss.features((count, 64), torch.float16, device), loss.arguments(count, device)
    with torch.no_grad():
        for tensor in features:
            tensor.mul_(64 if arguments.get("normalize", True) else 1)
    (scale * loss.fused(*features, **arguments).float()).backward()
    exact = in_float64(features)
    truth = torch.autograd.grad(scale * loss.plain(*exact, **arguments), exact)
    plain = [tensor.detach().requires_grad_() for tensor in features]
    (scale * loss.plain(*plain, **arguments).float()).backward()
    for tensor, same_dtype, expected in zip(features, plain, truth, strict=True):
        assert tensor.grad is not None
        assert same_dtype.grad is not None
        unscaled = (expected / scale).half()
        assert (unscaled.abs() < torch.finfo(torch.float16).smallest_normal).double().mean() > 0.5
        assert_as_accurate(tensor.grad, same_dtype.grad, expected, floor=FLOOR)


def test_no_gradient_is_formed_where_none_is_needed(device: torch.device, loss: Loss) -> None:
    features, arguments = loss.features((9, 4), torch.float32, device), loss.arguments(9, device)
    with torch.no_grad():
        value = loss.fused(*features, **arguments)
    assert not value.requires_grad
    assert not loss.fused(*(tensor.detach() for tensor in features), **arguments).requires_grad
    torch.testing.assert_close(loss.fused(*features, **arguments).detach(), value)


# ---- edges ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_for_a_pair(device: torch.device, loss: Loss, reduction: str, count: int) -> None:
    features, arguments = loss.features((count, 4), torch.float32, device), loss.arguments(count, device)
    value, *gradients = value_and_gradients(loss.fused, features, reduction=reduction, **arguments)
    assert value.shape == ((count,) if reduction == "none" else ())
    # One query finds its one key: the difference of two equal numbers.
    noise = 32 * ROUNDOFF[torch.float32] if loss.operator == "info_nce" else 0
    assert (value.abs() <= noise).all()
    for gradient in gradients:
        assert gradient.shape == (count, 4)
        assert (gradient.abs() <= noise).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_zero_features(device: torch.device, loss: Loss, dtype: torch.dtype) -> None:
    """All scores are 0, and so are the gradients, though zeros are divided by 1e-12."""
    features, arguments = loss.features((20, 5), dtype, device), loss.arguments(20, device)
    with torch.no_grad():
        for tensor in features:
            tensor.zero_()
    value, *gradients = value_and_gradients(loss.fused, features, **arguments)
    expected = value_and_gradients(loss.reference, in_float64(features), **arguments)[0]
    torch.testing.assert_close(value.double(), expected, rtol=16 * ROUNDOFF[dtype], atol=0)
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e25, 1e-8, 2e-13, 1e-20, 0.0])
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.endswith("-raw")])
def test_huge_tiny_and_zero_rows(device: torch.device, name: str, dtype: torch.dtype, size: float) -> None:
    """Rows above 1e-12 count by their direction alone; those below are divided by 1e-12."""
    loss = LOSSES[name]
    features, arguments = loss.features((20, 5), dtype, device), loss.arguments(20, device)
    with torch.no_grad():
        for tensor in features:
            tensor[3:6] *= size
    value, *gradients = value_and_gradients(loss.fused, features, **arguments)
    truth = value_and_gradients(loss.reference, in_float64(features), **arguments)
    others = [i for i in range(20) if not 3 <= i < 6]
    limit = 64 * ROUNDOFF[dtype]
    assert relative_error(value, truth[0]) < limit
    for gradient, expected in zip(gradients, truth[1:], strict=True):
        assert relative_error(gradient[others], expected[others]) < limit
        lost = expected[3:6].abs() < torch.finfo(dtype).tiny  # below this dtype's numbers
        assert relative_error(gradient[3:6].masked_fill(lost, 0), expected[3:6].masked_fill(lost, 0)) < limit


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_low_temperature(device: torch.device, loss: Loss, dtype: torch.dtype) -> None:
    """Scores up to 100 apart: e^100 is beyond float32, e^-100 below it."""
    features, arguments = loss.features((130, 16), dtype, device), loss.arguments(130, device)
    arguments["temperature"] = 0.01
    if not arguments.get("normalize", True):
        features = [(0.3 * tensor.detach()).requires_grad_() for tensor in features]
    loss.assert_as_accurate(features, arguments, value_and_gradients(loss.fused, features, **arguments), floor=32)


def test_strides_and_further_dimensions(device: torch.device, loss: Loss) -> None:
    features, arguments = loss.features((24, 6), torch.float64, device), loss.arguments(24, device)
    expected = value_and_gradients(loss.fused, features, **arguments)
    transposed = [tensor.detach().t().contiguous().t().requires_grad_() for tensor in features]
    spread = {
        name: value.repeat_interleave(3, 0)[::3] if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    assert_close(value_and_gradients(loss.fused, transposed, **spread), expected)
    deep = [tensor.detach().reshape(24, 3, 1, 2).requires_grad_() for tensor in features]
    value, *gradients = value_and_gradients(loss.fused, deep, **arguments)
    assert_close([value, *(gradient.flatten(1) for gradient in gradients)], expected)
    expanded = [tensor.detach()[:1].expand(24, 6).requires_grad_() for tensor in features]
    copied = [tensor.detach()[:1].repeat(24, 1).requires_grad_() for tensor in features]
    assert_close(*(value_and_gradients(loss.fused, rows, **arguments) for rows in (expanded, copied)))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("count", [300, 1100])
def test_same_bits_on_every_run(device: torch.device, loss: Loss, dtype: torch.dtype, count: int) -> None:
    features, arguments = loss.features((count, 32), dtype, device), loss.arguments(count, device)
    first = value_and_gradients(loss.fused, features, **arguments)
    for _ in range(3):
        again = value_and_gradients(loss.fused, features, **arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("count", [70, 1030])
def test_inputs_are_not_written(device: torch.device, loss: Loss, count: int) -> None:
    features, arguments = loss.features((count, 6), torch.float32, device), loss.arguments(count, device)
    inputs = [*features, *(value for value in arguments.values() if isinstance(value, Tensor))]
    before = [tensor.detach().clone() for tensor in inputs]
    for reduction in REDUCTIONS:
        value_and_gradients(loss.fused, features, reduction=reduction, **arguments)
    assert all(torch.equal(tensor, old) for tensor, old in zip(inputs, before, strict=True))


# ---- memory ----


@pytest.mark.large
def test_memory_is_that_of_the_features(device: torch.device, loss: Loss) -> None:
    """Of N = 6144 rows, a quarter of one ``[N, N]`` tensor; the reference holds more than ten."""
    count, width = 6144, 16
    features, arguments = loss.features((count, width), torch.float32, device), loss.arguments(count, device)

    def step() -> object:
        return torch.autograd.grad(loss.fused(*features, **arguments), features)

    step()
    gc.collect()
    peak = peak_extra_bytes(step, device.type, 0)  # what torch's allocators hand out
    assert peak <= 0.25 * 4 * count * count


# ---- a citizen of torch ----


def operator_arguments(
    loss: Loss, features: list[Tensor], arguments: dict[str, Any], reduction: int
) -> tuple[Any, ...]:
    """Of the loss's operator, from those of its public function."""
    dtype, count, form = features[0].dtype, len(features[0]), features[0].requires_grad and reduction != 0
    temperature, total = arguments["temperature"], _library.accumulate_dtype(dtype)
    if loss.operator == "conr":
        labels = (arguments["targets"].unsqueeze(1).to(total), arguments["preds"].to(total))
        variant = ["paper", "agedb", "nyud2"].index(arguments["variant"])
        numbers = (1.0, temperature, arguments["eta"], variant, 2, reduction, dtype, 0, count, form)
        return (*features, *labels, arguments["weights"].to(total), *numbers)
    normalize = arguments.get("normalize", True)
    if loss.operator == "supcon":
        return (*features, arguments["labels"], temperature, normalize, reduction, dtype, 0, count, form)
    directions = (True, arguments.get("symmetric", False))
    others = (arguments["log_q"].to(total), arguments["ids"], arguments["ids"])
    return (*features, *others, temperature, normalize, *directions, 0, reduction, dtype, [form, form])


@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(device: torch.device, loss: Loss, reduction: int, needs_grad: bool) -> None:
    features, arguments = loss.features((20, 4), torch.float32, device), loss.arguments(20, device)
    if not needs_grad:
        features = [tensor.detach() for tensor in features]
    forward = operator_arguments(loss, features, arguments, reduction)
    opcheck(getattr(torch.ops.pyreg, loss.operator).default, forward)


def test_opcheck_of_the_gradient(device: torch.device, loss: Loss) -> None:
    features, arguments = loss.features((20, 4), torch.float32, device), loss.arguments(20, device)
    features = [tensor.detach() for tensor in features]
    forward = operator_arguments(loss, features, arguments, 1)
    results = getattr(torch.ops.pyreg, loss.operator)(*forward)
    upstream = torch.rand(20, device=device)
    if loss.operator == "info_nce":
        by_key = upstream.flip(0) if forward[8] else upstream[:0]
        backward = (upstream, by_key, *forward[:5], *results[1:3], *forward[5:7], 0, [True, True])
    else:
        tensors = {"conr": 4, "supcon": 2}[loss.operator]
        backward = (upstream, *forward[:tensors], results[1], *forward[tensors:-5], 0, 20)
    opcheck(getattr(torch.ops.pyreg, f"{loss.operator}_backward").default, backward)


@pytest.mark.cpu_only
def test_numbers_out_of_range_in_direct_calls(device: torch.device, loss: Loss) -> None:
    features, arguments = loss.features((9, 4), torch.float32, device), loss.arguments(9, device)
    forward = list(operator_arguments(loss, [tensor.detach() for tensor in features], arguments, 1))

    def call(position: int, *values: int) -> tuple[Tensor, ...]:
        changed = [*forward[:position], *values, *forward[position + len(values) :]]
        return getattr(torch.ops.pyreg, loss.operator)(*changed)  # type: ignore[no-any-return]

    position, most = len(forward) - (3 if loss.operator == "info_nce" else 5), 2**63 - 1
    for reduction in (-1, 3):
        with pytest.raises(ValueError, match=f"expected reduction 0 .* got {reduction}"):
            call(position, reduction)
    if loss.operator != "info_nce":
        for first_row, row_count in ((-1, 9), (0, 10), (9, 1), (most, most)):
            with pytest.raises(ValueError, match="expected rows within the features'"):
                call(position + 2, first_row, row_count)
    elif not arguments.get("symmetric", False):
        for offset in (9, most, -9, -most):  # no query has a positive
            assert call(position - 1, offset)[0] == 0


@pytest.mark.needs_compiler
@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["conr-paper", "supcon", "info_nce-symmetric"])
def test_compile(device: torch.device, name: str) -> None:
    torch._dynamo.reset()
    loss = LOSSES[name]
    features, arguments = loss.features((20, 4), torch.float64, device), loss.arguments(20, device)
    compiled = torch.compile(loss.fused, fullgraph=True)
    assert_close(*(value_and_gradients(f, features, **arguments) for f in (compiled, loss.fused)))


@pytest.mark.cpu_only
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_once_for_all_numbers_of_rows(device: torch.device, loss: Loss, reduction: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss.fused, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for count in (20, 33, 47):
        features, arguments = loss.features((count, 4), torch.float64, device), loss.arguments(count, device)
        arguments["reduction"] = reduction
        assert_close(*(value_and_gradients(f, features, **arguments) for f in (compiled, loss.fused)))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["conr-paper", "supcon", "info_nce"])
def test_export(device: torch.device, name: str) -> None:
    loss = LOSSES[name]
    module = {"conr": pyreg.nn.ConRLoss, "supcon": pyreg.nn.SupConLoss, "info_nce": pyreg.nn.InfoNCELoss}[
        loss.operator
    ]()
    features, arguments = loss.features((20, 4), torch.float32, device), loss.arguments(20, device)
    inputs = (*(tensor.detach() for tensor in features), *(v for v in arguments.values() if isinstance(v, Tensor)))
    exported = torch.export.export(module, inputs)
    torch.testing.assert_close(exported.module()(*inputs), module(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [20, 600])
def test_meta_tensors(loss: Loss, dtype: torch.dtype, count: int) -> None:
    meta = torch.device("meta")
    features, arguments = loss.features((count, 4), dtype, meta), loss.arguments(count, meta)
    for reduction, shape in (("mean", ()), ("none", (count,))):
        value = loss.fused(*features, reduction=reduction, **arguments)
        assert (value.shape, value.dtype, value.is_meta) == (shape, dtype, True)
        gradients = torch.autograd.grad(value.sum(), features)
        assert [(g.shape, g.dtype) for g in gradients] == [((count, 4), dtype)] * loss.trained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: torch.device, loss: Loss, dtype: torch.dtype) -> None:
    """Features keep their dtype; the loss is float32, and float64 for float64."""
    features, arguments = loss.features((100, 16), torch.float32, device), loss.arguments(100, device)
    expected = value_and_gradients(loss.fused, features, **arguments)
    with torch.autocast(device.type, dtype=dtype):
        actual = value_and_gradients(loss.fused, features, **arguments)
        again = torch.autograd.grad(loss.fused(*features, reduction="none", **arguments).sum(), features)
        graph = torch.autograd.grad(loss.fused(*features, **arguments), features, create_graph=True)
        exact = loss.fused(*(tensor.double() for tensor in features), **arguments)
        short = loss.fused(*(tensor.to(dtype) for tensor in features), **arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    wanted = torch.autograd.grad(loss.fused(*features, reduction="none", **arguments).sum(), features)
    torch.testing.assert_close(again, wanted, rtol=0, atol=0)
    assert_close([0.5 * gradient.detach() for gradient in graph], expected[1:], torch.float32)
    assert (exact.dtype, short.dtype) == (torch.float64, torch.float32)
    rounded = loss.fused(*(tensor.to(dtype).float() for tensor in features), **arguments)
    assert_close(short, rounded, torch.float32)


def test_functional_transforms(device: torch.device, loss: Loss) -> None:
    features, arguments = loss.features((9, 4), torch.float64, device), loss.arguments(9, device)
    constant = tuple(tensor.detach() for tensor in features)
    indices = tuple(range(loss.trained))
    expected = torch.autograd.grad(loss.fused(*features, **arguments), features)
    assert_close(torch.func.grad(lambda *f: loss.fused(*f, **arguments), argnums=indices)(*constant), expected)
    rows, expected_rows = (
        torch.func.jacrev(lambda *f, g=g: g(*f, reduction="none", **arguments), argnums=indices)(*constant)
        for g in (loss.fused, loss.reference)
    )
    assert_close(rows, expected_rows)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap(device: torch.device, loss: Loss, reduction: str) -> None:
    """One call a sample, also where the batch is not the first dimension; gradients too."""
    batches = [loss.features((9, 4), torch.float64, device) for _ in range(3)]
    arguments = loss.arguments(9, device) | {"reduction": reduction}
    stacked = [torch.stack([batch[i].detach() for batch in batches], 1) for i in range(loss.trained)]

    def value(*f: Tensor) -> Tensor:
        return loss.fused(*f, **arguments)

    assert_close(torch.vmap(value, in_dims=1)(*stacked), torch.stack([value(*batch).detach() for batch in batches]))
    gradients = torch.vmap(torch.func.grad(lambda *f: value(*f).sum()), in_dims=1)(*stacked)
    expected = [torch.autograd.grad(value(*batch).sum(), batch[0])[0] for batch in batches]
    assert_close(gradients, torch.stack(expected))


def test_devices_without_kernels_take_the_reference(
    device: torch.device, loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, arguments = loss.features((20, 4), torch.float64, device), loss.arguments(20, device)
    expected = value_and_gradients(loss.fused, features, **arguments)
    monkeypatch.setattr(_library, "has_kernel", lambda tensor: False)
    monkeypatch.setattr(_library, "differentiable", None)
    assert_close(value_and_gradients(loss.fused, features, **arguments), expected)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert loss.fused(*(tensor.float() for tensor in features), **arguments).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("count", [64, 700])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_runs_without_waiting_and_in_a_graph(loss: Loss, dtype: torch.dtype, count: int) -> None:
    device = torch.device("cuda")
    features, arguments = loss.features((count, 32), dtype, device), loss.arguments(count, device)

    value = loss.fused(*features, **arguments)
    expected = [value.detach(), *torch.autograd.grad(value, features)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.fused(*features, **arguments).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, upstream = torch.cuda.CUDAGraph(), torch.ones_like(value)
    with torch.cuda.graph(graph):
        value = loss.fused(*features, **arguments)
        captured = [value.detach(), *torch.autograd.grad(value, features, upstream)]
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)


# ---- modules ----

MODULES = {
    "conr-paper": (
        pyreg.nn.ConRLoss,
        "ConRLoss(window=1.0, temperature=0.2, eta=0.05, variant='paper', label_norm=2, ",
    ),
    "supcon": (pyreg.nn.SupConLoss, "SupConLoss(temperature=0.2, normalize=True, "),
    "info_nce": (pyreg.nn.InfoNCELoss, "InfoNCELoss(temperature=0.2, normalize=True, symmetric=False, "),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(device: torch.device, name: str) -> None:
    loss, (kind, text) = LOSSES[name], MODULES[name]
    features, arguments = loss.features((20, 4), torch.float32, device), loss.arguments(20, device)
    module = kind(**loss.options, reduction="sum")
    assert repr(module) == text + "reduction='sum')"
    others = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    expected = loss.fused(*features, reduction="sum", **arguments)
    torch.testing.assert_close(module(*features, *others.values()), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(*features, **others), expected)
    assert not module.state_dict()
    assert not list(module.parameters())
    assert repr(kind(group=True)).endswith("group=default)")
