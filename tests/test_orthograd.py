"""OrthoGrad: the operator against the reference and Gram-Schmidt, and the optimizer in all that torch does with one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from pyreg.ops import _library
from pyreg.optim import OrthoGrad, orthogonalize_gradients_
from pyreg.reference import orthograd as reference
from tests.oracle import FLOAT_DTYPES, ROUNDOFF, assert_as_accurate, relative_error

GOLDEN = Path(__file__).parent / "golden"
CHUNK = 16384  # csrc/orthograd/orthograd.h: a tensor of more elements is summed in several parts

# Around lanes of a SIMD vector, packs of 16 bytes, a block of threads, a chunk; primes; several dimensions.
SHAPES = [
    (2,), (3,), (7,), (8,), (15,), (16,), (17,), (33,), (113,), (257,), (5, 3), (2, 3, 4), (64, 3, 7, 7), (CHUNK - 1,),
    (CHUNK,), (CHUNK + 1,), (2 * CHUNK + 1031,),
]  # fmt: skip
ids = lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None  # noqa: E731

Shape = tuple[int, ...]


def parameter(weight: Tensor, grad: Tensor | None) -> torch.nn.Parameter:
    param = torch.nn.Parameter(weight)
    param.grad = grad
    return param


def random_parameter(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    """Weights and gradients at an angle that depends on the draw: a quarter of the gradient lies along the weights."""
    weight = torch.randn(shape, dtype=torch.float64)
    grad = torch.randn(shape, dtype=torch.float64) + 0.25 * weight
    return parameter(weight.to(dtype).to(device), grad.to(dtype).to(device))


def parameter_at_angle(n: int, angle: float, dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    """A gradient that is longer than the weights and differs from their direction by the angle."""
    weight, across = torch.randn(2, n, dtype=torch.float64)
    across -= weight * (weight.dot(across) / weight.dot(weight))
    grad = 3 * weight / weight.norm() + 3 * angle * across / across.norm()
    return parameter(weight.to(dtype).to(device), grad.to(dtype).to(device))


def projected(param: Tensor) -> Tensor:
    """The projected gradient, by the operator; weights are only read, and the gradient keeps its memory."""
    weight, address = param.detach().clone(), param.grad.data_ptr()
    orthogonalize_gradients_([param])
    assert param.grad.data_ptr() == address
    torch.testing.assert_close(param.detach(), weight, rtol=0, atol=0, equal_nan=True)
    return param.grad


def gram_schmidt(weight: Tensor, grad: Tensor) -> Tensor:
    """The truth by other algebra: unit vectors, projected twice, in 64-bit significands."""
    w, g = (x.detach().double().cpu().numpy().astype(np.longdouble).ravel() for x in (weight, grad))
    length = np.sqrt(g @ g)
    unit = w / np.sqrt(w @ w)
    direction = g / length
    for _ in range(2):
        direction = direction - unit * (unit @ direction)
        direction = direction / np.sqrt(direction @ direction)
    return torch.from_numpy((length * direction).astype(np.float64)).view(grad.shape)


# ---- right, in every dtype and shape ----


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_against_reference(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    param = random_parameter(shape, dtype, device)
    plain = reference.orthogonalize_gradient(param.detach(), param.grad)
    truth = reference.orthogonalize_gradient(param.detach().double(), param.grad.double())
    assert_as_accurate(projected(param), plain, truth)


@pytest.mark.parametrize("shape", [(2,), (113,), (5, 3), (2 * CHUNK + 1031,)], ids=ids)
def test_against_gram_schmidt(device: torch.device, shape: Shape) -> None:
    param = random_parameter(shape, torch.float64, device)
    truth = gram_schmidt(param, param.grad)
    assert relative_error(projected(param), truth) <= 32 * ROUNDOFF[torch.float64]


@pytest.mark.large
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_against_gram_schmidt_at_a_million(device: torch.device, dtype: torch.dtype) -> None:
    param = random_parameter((1_000_003,), dtype, device)
    truth = gram_schmidt(param, param.grad)
    assert relative_error(projected(param), truth) <= (64 if dtype == torch.float64 else 2) * ROUNDOFF[dtype]


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("n", [100, 2 * CHUNK + 5])
def test_nearly_parallel(device: torch.device, n: int, dtype: torch.dtype, angle: float) -> None:
    """Nothing is lost but to the rounding of the result, where plain PyTorch in fp32 loses all digits at 1e-7."""
    param = parameter_at_angle(n, angle, dtype, device)
    truth = gram_schmidt(param, param.grad)
    limit = 2 * ROUNDOFF[dtype] * (8 / angle if dtype == torch.float64 else 1)
    assert relative_error(projected(param), truth) <= limit


@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_result_is_orthogonal_and_of_the_same_norm(device: torch.device, dtype: torch.dtype, angle: float) -> None:
    param = parameter_at_angle(1000, angle, dtype, device)
    weight, before = param.detach().double(), param.grad.double().norm()
    grad = projected(param).double()
    cosine = weight.dot(grad) / (weight.norm() * grad.norm())
    slack = 16 / angle if dtype == torch.float64 else 2
    assert cosine.abs() <= slack * ROUNDOFF[dtype]
    assert (grad.norm() / before - 1).abs() <= slack * ROUNDOFF[dtype]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (40,), (CHUNK + 3,)], ids=ids)
@pytest.mark.parametrize("factor", [-2.0, 0.5])
def test_parallel_gradient_becomes_zero(device: torch.device, shape: Shape, dtype: torch.dtype, factor: float) -> None:
    weight = torch.randn(shape).to(dtype).to(device)
    assert not projected(parameter(weight, factor * weight)).any()


@pytest.mark.parametrize("n", [1, 3, 1000, CHUNK + 1])
def test_rounding_of_float64_is_not_blown_up(device: torch.device, n: int) -> None:
    weight = torch.randn(n, dtype=torch.float64, device=device)
    assert not projected(parameter(weight, weight * 3.3)).any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (37,), (CHUNK + 1,)], ids=ids)
def test_zero_weight_leaves_the_gradient_to_the_bit(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    grad = torch.randn(shape).to(dtype).to(device)
    grad.view(-1)[::3] = torch.finfo(dtype).smallest_normal / 4
    grad.view(-1)[::5] = -0.0
    result = projected(parameter(torch.zeros_like(grad), grad.clone()))
    assert torch.equal(result, grad)
    assert torch.equal(result.signbit(), grad.signbit())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(), (37,), (CHUNK + 1,)], ids=ids)
def test_zero_gradient_stays_zero(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype).to(device)
    assert not projected(parameter(weight, torch.zeros_like(weight))).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("of", ["weight", "grad"])
def test_squares_beyond_float32(device: torch.device, scale: float, of: str) -> None:
    param = random_parameter((1000,), torch.float32, device)
    (param.data if of == "weight" else param.grad).mul_(scale)
    truth = reference.orthogonalize_gradient(param.detach().double(), param.grad.double())
    assert relative_error(projected(param), truth) <= 2 * ROUNDOFF[torch.float32]


@pytest.mark.parametrize("scale", [1e-170, 1e-20, 1e160])
def test_squares_beyond_float64(device: torch.device, scale: float) -> None:
    """Where w.w underflows the weights count as zero; where it overflows the projection is zero, as in the formula."""
    param = random_parameter((1000,), torch.float64, device)
    param.data.mul_(scale)
    expected = reference.orthogonalize_gradient(param.detach(), param.grad)
    assert relative_error(projected(param), expected) <= 1e-13


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("of", ["weight", "grad"])
@pytest.mark.parametrize("n", [50, CHUNK + 7])
def test_nan_and_infinity(device: torch.device, n: int, of: str, special: float, dtype: torch.dtype) -> None:
    param = random_parameter((n,), dtype, device)
    (param.data if of == "weight" else param.grad)[n // 2] = special
    expected = reference.orthogonalize_gradient(param.detach().double(), param.grad.double())
    assert expected.isnan().all()
    assert projected(param).isnan().all()


@pytest.mark.large
def test_same_bits_for_any_number_of_threads(device: torch.device) -> None:
    sizes = [5, 1000, CHUNK, CHUNK + 1, 300_007, 1_000_003, 3]
    params = [random_parameter((size,), torch.float32, device) for size in sizes]
    params.append(parameter_at_angle(100_003, 1e-5, torch.float32, device))
    grads = [param.grad.clone() for param in params]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            for param, grad in zip(params, grads, strict=True):
                param.grad.copy_(grad)
            orthogonalize_gradients_(params)
            results.append([param.grad.clone() for param in params])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# ---- lists of tensors ----


def assert_all_projected(params: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for param, truth in zip(params, expected, strict=True):
        assert relative_error(param.grad, truth) <= 4 * ROUNDOFF[param.dtype] + 1e-14


def truths(params: Sequence[Tensor]) -> list[Tensor]:
    return [reference.orthogonalize_gradient(param.detach().double(), param.grad.double()) for param in params]


def test_a_model_of_mixed_dtypes_sizes_and_angles(device: torch.device) -> None:
    shapes = [(3, 5), (CHUNK + 9,), (2,), (64, 113), (0,), (3 * CHUNK,), (17,)]
    params = [random_parameter(shape, dtype, device) for shape in shapes for dtype in FLOAT_DTYPES]
    params += [parameter_at_angle(n, 1e-4, torch.float32, device) for n in (50, CHUNK + 50)]
    expected = truths(params)
    orthogonalize_gradients_(param for param in params)
    assert_all_projected(params, expected)


@pytest.mark.parametrize("count", [1000, 1001, 2003])
def test_more_tensors_than_a_kernel_parameter_holds(device: torch.device, count: int) -> None:
    params = [random_parameter((2 + i % 5,), torch.float32, device) for i in range(count)]
    params[0] = parameter_at_angle(40, 1e-4, torch.float32, device)
    params[-1] = parameter_at_angle(40, 1e-4, torch.float32, device)
    truth = [gram_schmidt(param, param.grad) for param in params]
    orthogonalize_gradients_(params)
    for param, expected in zip(params, truth, strict=True):
        # Two elements may come out nearly parallel: the truth for those is Gram-Schmidt's.
        assert relative_error(param.grad, expected) <= 4 * ROUNDOFF[torch.float32]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("weight_offset", "grad_offset"), [(1, 0), (0, 1), (3, 3)])
def test_memory_off_the_16_byte_grid(
    device: torch.device, weight_offset: int, grad_offset: int, dtype: torch.dtype
) -> None:
    n = CHUNK + 101
    weight, grad = torch.randn(2, n + 8).to(dtype).to(device)
    rest = grad.clone()
    param = parameter(weight[weight_offset : weight_offset + n], grad[grad_offset : grad_offset + n])
    expected = truths([param])
    projected(param)
    assert_all_projected([param], expected)
    outside = torch.ones(n + 8, dtype=torch.bool, device=device)
    outside[grad_offset : grad_offset + n] = False
    assert torch.equal(grad[outside], rest[outside])


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def strided(x: Tensor) -> Tensor:
    """The same values with gaps between them."""
    wide = torch.full((*x.shape, 2), 7.0, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "both channels_last": (channels_last, channels_last),
    "weight channels_last": (channels_last, torch.clone),
    "grad channels_last": (torch.clone, channels_last),
    "both transposed": (lambda x: x.transpose(0, 3).clone().transpose(0, 3),) * 2,
    "both with gaps": (strided, strided),
    "weight with gaps": (strided, torch.clone),
    "grad with gaps": (torch.clone, strided),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (33, 8, 9, 10)], ids=ids)
def test_strides(device: torch.device, layout: str, shape: Shape) -> None:
    lay_weight, lay_grad = LAYOUTS[layout]
    weight, grad = torch.randn(2, *shape, device=device)
    param = torch.nn.Parameter(lay_weight(weight))
    param.grad = lay_grad(grad)
    strides = param.grad.stride()
    expected = truths([param])
    projected(param)
    assert_all_projected([param], expected)
    assert param.grad.stride() == strides
    if lay_grad is strided:
        assert (param.grad.as_strided(param.grad.shape, strides, 1) == 7).all()


def test_expanded_gradient_becomes_dense(device: torch.device) -> None:
    param = parameter(torch.randn(6, 4, device=device), torch.randn(4, device=device).expand(6, 4))
    source = param.grad
    before = source.clone()
    expected = truths([param])
    orthogonalize_gradients_([param])
    assert_all_projected([param], expected)
    assert torch.equal(source, before)


def test_expanded_weight(device: torch.device) -> None:
    param = torch.randn(4, device=device).expand(6, 4).requires_grad_()
    param.retain_grad()
    param.grad = torch.randn(6, 4, device=device)
    expected = truths([param])
    orthogonalize_gradients_(param)
    assert_all_projected([param], expected)


def test_what_is_left_out(device: torch.device) -> None:
    orthogonalize_gradients_([])
    empty = parameter(torch.empty(0, 3, device=device), torch.empty(0, 3, device=device))
    without = parameter(torch.ones(3, device=device), None)
    orthogonalize_gradients_([empty, without])
    assert without.grad is None
    assert empty.grad.shape == (0, 3)


def test_a_single_tensor_and_a_tied_one(device: torch.device) -> None:
    once, tied = (parameter(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 4.0])) for _ in range(2))
    once, tied = once.to(device), tied.to(device)
    once.grad, tied.grad = torch.tensor([[3.0, 4.0]] * 2, device=device)
    orthogonalize_gradients_(once)
    orthogonalize_gradients_([tied, tied])
    expected = torch.tensor([-1.0, 1.0], device=device) * 12.5**0.5
    torch.testing.assert_close(once.grad, expected)
    torch.testing.assert_close(tied.grad, expected)


def test_devices_without_kernels_take_the_reference(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_operator(*_: Any) -> None:
        raise AssertionError("the operator was called")

    monkeypatch.setattr(_library, "has_kernel", lambda tensor: False)
    monkeypatch.setattr("pyreg.ops.orthograd._operator", no_operator)
    params = [random_parameter((5, 3), dtype, device) for dtype in FLOAT_DTYPES]
    expected = [reference.orthogonalize_gradient(param.detach(), param.grad) for param in params]
    orthogonalize_gradients_(params)
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, expected, strict=True))


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no gradients of another dtype")
def test_gradient_of_another_dtype(device: torch.device) -> None:
    param = torch.nn.Parameter(torch.randn(50, device=device))
    param.grad_dtype = torch.bfloat16
    param.grad = torch.randn(50, device=device).bfloat16()
    truth = reference.orthogonalize_gradient(param.detach().double(), param.grad.double())
    orthogonalize_gradients_([param])
    assert param.grad.dtype == torch.bfloat16
    assert relative_error(param.grad, truth) <= 2 * ROUNDOFF[torch.bfloat16]


# ---- a citizen of torch ----


def operator(*lists: list[Tensor]) -> None:
    torch.ops.pyreg.orthogonalize_gradients_(*lists)


def test_opcheck(device: torch.device) -> None:
    params = [torch.randn(shape, device=device, requires_grad=True) for shape in ((3, 4), (7,), (0,), ())]
    grads = [torch.randn_like(param, requires_grad=False) for param in params]
    opcheck(torch.ops.pyreg.orthogonalize_gradients_.default, (params, grads))


def test_meta_tensors() -> None:
    orthogonalize_gradients_([parameter(torch.empty(3, device="meta"), torch.empty(3, device="meta"))])


def test_a_changed_gradient_is_a_new_version(device: torch.device) -> None:
    param = random_parameter((5,), torch.float32, device)
    version = param.grad._version
    orthogonalize_gradients_(param)
    assert param.grad._version > version


def test_a_saved_gradient_is_not_changed_in_silence(device: torch.device) -> None:
    param = random_parameter((5,), torch.float32, device)
    loss = (param * param.grad).sum()
    orthogonalize_gradients_(param)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.needs_compiler)])
def test_compile_fullgraph(device: torch.device, backend: str) -> None:
    params = [random_parameter(shape, torch.float32, device) for shape in ((5, 3), (7,))]
    expected = truths(params)

    @torch.compile(fullgraph=True, backend=backend)
    def halve(params: list[Tensor]) -> list[Tensor]:
        for param in params:
            param.grad.mul_(2.0)
        orthogonalize_gradients_(params)
        return [param.grad / 2 for param in params]

    for result, param, truth in zip(halve(params), params, expected, strict=True):
        assert relative_error(result, truth) <= 4 * ROUNDOFF[torch.float32]
        assert relative_error(param.grad, 2 * truth) <= 4 * ROUNDOFF[torch.float32]


def test_autocast_changes_nothing(device: torch.device) -> None:
    param = random_parameter((50,), torch.float32, device)
    expected = truths([param])
    with torch.autocast(device.type, dtype=torch.bfloat16):
        orthogonalize_gradients_([param])
    assert_all_projected([param], expected)


def test_vmap_is_refused(device: torch.device) -> None:
    with pytest.raises(NotImplementedError, match="orthogonalize_gradients_: vmap is not supported"):
        torch.vmap(lambda w, g: operator([w], [g]))(*torch.randn(2, 3, 4, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_of_four_launches_without_synchronisation() -> None:
    params = [random_parameter((size,), torch.float32, torch.device("cuda")) for size in (3, 1000, 100_003) * 50]
    grads = [param.grad.clone() for param in params]
    expected = truths(params)
    orthogonalize_gradients_(params)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            orthogonalize_gradients_(params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for param, grad in zip(params, grads, strict=True):
        param.grad.copy_(grad)
    graph.replay()
    assert_all_projected(params, expected)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        orthogonalize_gradients_(params)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= 4, [kernel.name for kernel in kernels]


# ---- hard to misuse ----


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (torch.nn.Linear(2, 2), r"orthogonalize_gradients_: expected params .* got Linear; pass model.parameters"),
        (3, r"orthogonalize_gradients_: expected params to be a tensor or an iterable of tensors, got int"),
        ([torch.ones(2), "x"], r"orthogonalize_gradients_: expected params to hold tensors, got str at position 1"),
        (torch.nn.Linear(2, 2).named_parameters(), r"got tuple at position 0; pass model.parameters\(\), not nam"),
        ([{"params": []}], r"got dict at position 0; .* param_groups"),
    ],
)
def test_params_of_a_wrong_type(params: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        orthogonalize_gradients_(params)


def test_gradients_that_are_refused() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"expected dense gradients, got layout torch.sparse_coo .*\[5, 3\].*to_dense"):
        orthogonalize_gradients_(embedding.parameters())
    complex_ = parameter(torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"bfloat16 or float16, got torch.complex64 for a parameter .*view_as_real"):
        orthogonalize_gradients_(complex_)


def test_direct_calls_of_the_operator_are_checked(device: torch.device) -> None:
    w = torch.ones(3, device=device)
    with pytest.raises(ValueError, match="expected one gradient a parameter, got 1 params and 2 grads"):
        operator([w], [w.clone(), w.clone()])
    with pytest.raises(ValueError, match=r"expected grads\[1\] of the shape of params\[1\]"):
        operator([w, w], [w.clone(), torch.ones(4, device=device)])
    with pytest.raises(ValueError, match=r"expected grads\[0\] of dtype Float as params\[0\], got Double"):
        operator([w], [w.double()])
    with pytest.raises(ValueError, match="expected a float64, float32, bfloat16 or float16 tensor, got Long"):
        operator([w.long()], [w.long()])
    with pytest.raises(ValueError, match=r"expected grads\[0\] to have memory of its own .*; clone it first"):
        operator([w], [torch.ones(1, device=device).expand(3)])


# ---- the optimizer ----


def model_and_data(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(device, dtype)
    return model, torch.randn(16, 6).to(device, dtype)


def backward(model: torch.nn.Module, data: Tensor) -> Tensor:
    loss = model(data).square().mean()
    loss.backward()
    return loss


def train(
    model: torch.nn.Module, data: Tensor, optimizer: torch.optim.Optimizer, steps: int, *, project: bool = False
) -> list[Tensor]:
    """The weights after some steps; `project` does by hand what OrthoGrad does around another optimizer."""
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, data)
        if project:
            orthogonalize_gradients_(model.parameters())
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "cls"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_golden_run_of_the_released_code(device: torch.device, name: str, cls: type[torch.optim.Optimizer]) -> None:
    arrays = np.load(GOLDEN / f"orthograd_{name}.npz")
    golden = {key: torch.from_numpy(value).to(device) for key, value in arrays.items()}
    settings = {key.removeprefix("hp_"): value.item() for key, value in golden.items() if key.startswith("hp_")}
    params = [torch.nn.Parameter(golden[f"p{i}_0"].clone()) for i in range(3)]
    optimizer = OrthoGrad(params, cls, **settings)
    for t in range(3):
        for i, param in enumerate(params):
            param.grad = golden[f"g{i}_{t}"].clone()
        optimizer.step()
        for i, param in enumerate(params):
            assert relative_error(param.grad, golden[f"og{i}_{t}"]) <= 1e-13
            assert relative_error(param, golden[f"p{i}_{t + 1}"]) <= 1e-13


BASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "maximize": True}),
    (torch.optim.AdamW, {"lr": 0.1, "foreach": True}),
    (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
    (torch.optim.Adam, {"lr": 0.1, "amsgrad": True, "foreach": False}),
    (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5}),  # has state before the first step
    (torch.optim.RMSprop, {"lr": 0.1}),
]
base_ids = lambda value: value.__name__ if isinstance(value, type) else "-".join(value)  # noqa: E731


@pytest.mark.parametrize(("cls", "options"), BASES, ids=base_ids)
def test_is_the_base_optimizer_on_projected_gradients(
    device: torch.device, cls: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model, data = model_and_data(device)
    twin = copy.deepcopy(model)
    ours = train(model, data, OrthoGrad(model.parameters(), cls, **options), 3)
    by_hand = train(twin, data, cls(twin.parameters(), **options), 3, project=True)
    assert_same(ours, by_hand)


def test_default_base_and_shared_attributes(device: torch.device) -> None:
    model, _ = model_and_data(device)
    optimizer = OrthoGrad(model.parameters(), lr=0.3)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer.base_optimizer) is torch.optim.SGD
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.defaults is optimizer.base_optimizer.defaults
    assert optimizer.defaults["lr"] == 0.3
    assert repr(optimizer).startswith("OrthoGrad(SGD (")
    assert "lr: 0.3" in repr(optimizer)


def test_parameter_groups_with_their_own_options(device: torch.device) -> None:
    def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
        return [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "weight_decay": 0.2}]

    model, data = model_and_data(device)
    twin = copy.deepcopy(model)
    optimizer = OrthoGrad(groups(model), torch.optim.AdamW, lr=0.01)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.01), (0.01, 0.2)]
    ours = train(model, data, optimizer, 3)
    assert_same(ours, train(twin, data, torch.optim.AdamW(groups(twin), lr=0.01), 3, project=True))


def test_add_param_group(device: torch.device) -> None:
    model, data = model_and_data(device)
    twin = copy.deepcopy(model)
    optimizer = OrthoGrad(model[0].parameters(), lr=0.1)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.3})
    assert [group["lr"] for group in optimizer.base_optimizer.param_groups] == [0.1, 0.3]
    ours = train(model, data, optimizer, 2)
    groups = [{"params": twin[0].parameters()}, {"params": twin[2].parameters(), "lr": 0.3}]
    assert_same(ours, train(twin, data, torch.optim.SGD(groups, lr=0.1), 2, project=True))


@pytest.mark.parametrize("through", ["state_dict", "file", "pickle", "deepcopy"])
def test_a_run_continues_from_a_copy(device: torch.device, through: str) -> None:
    model, data = model_and_data(device)
    optimizer = OrthoGrad(model.parameters(), torch.optim.AdamW, lr=0.05, betas=(0.8, 0.9))
    train(model, data, optimizer, 2)
    if through in ("pickle", "deepcopy"):  # with the parameters: the copy holds copies of them
        pair = (model, optimizer)
        twin, restored = copy.deepcopy(pair) if through == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert type(restored) is OrthoGrad
        assert restored.param_groups[0]["params"][0] is next(twin.parameters())
        assert restored.param_groups[0]["params"][0] is not next(model.parameters())
    else:
        twin = copy.deepcopy(model)
        state = copy.deepcopy(optimizer.state_dict())  # torch does not copy the state it loads
        if through == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        restored = OrthoGrad(twin.parameters(), torch.optim.AdamW, lr=1.0)
        restored.load_state_dict(state)
    assert restored.param_groups is restored.base_optimizer.param_groups
    assert restored.state is restored.base_optimizer.state
    assert restored.param_groups[0]["betas"] == (0.8, 0.9)
    assert_same(train(twin, data, restored, 2), train(model, data, optimizer, 2))


def test_checkpoints_are_those_of_the_base_optimizer(device: torch.device) -> None:
    model, data = model_and_data(device)
    optimizer = OrthoGrad(model.parameters(), torch.optim.AdamW, lr=0.05)
    train(model, data, optimizer, 2)
    plain = torch.optim.AdamW(model.parameters(), lr=1.0)
    plain.load_state_dict(optimizer.state_dict())
    back = OrthoGrad(model.parameters(), torch.optim.AdamW, lr=2.0)
    back.load_state_dict(plain.state_dict())
    for state in (plain.state_dict(), back.state_dict()):
        torch.testing.assert_close(state, optimizer.state_dict(), rtol=0, atol=0)


def test_learning_rate_schedulers(device: torch.device) -> None:
    model, data = model_and_data(device)
    optimizer = OrthoGrad(model.parameters(), torch.optim.SGD, lr=1.0, momentum=0.9)
    schedulers = [
        torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10),  # writes lr and momentum
    ]
    for scheduler in schedulers:
        train(model, data, optimizer, 1)
        before = dict(optimizer.base_optimizer.param_groups[0])
        scheduler.step()
        after = optimizer.base_optimizer.param_groups[0]
        assert after["lr"] != before["lr"]
    assert after["momentum"] != before["momentum"]


def test_a_scheduler_sees_the_groups_of_a_loaded_checkpoint(device: torch.device) -> None:
    model, data = model_and_data(device)
    optimizer = OrthoGrad(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, data, optimizer, 1)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.5


def test_step_with_a_closure(device: torch.device) -> None:
    model, data = model_and_data(device)
    twin = copy.deepcopy(model)
    optimizer = OrthoGrad(model.parameters(), lr=0.1)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = backward(model, data)
        calls.append([param.grad.clone() for param in model.parameters()])
        return loss

    expected_loss = model(data).square().mean()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert len(calls) == 1
    assert torch.equal(loss.detach(), expected_loss)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    assert_same([p.detach() for p in model.parameters()], train(twin, data, plain, 1, project=True))
    for param, raw in zip(model.parameters(), calls[0], strict=True):
        assert not torch.equal(param.grad, raw)
    assert optimizer.step() is None


def test_lbfgs_projects_every_evaluation(device: torch.device) -> None:
    model, data = model_and_data(device)
    optimizer = OrthoGrad(model.parameters(), torch.optim.LBFGS, lr=0.1, max_iter=4)
    weights: list[list[Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights.append([param.detach().clone() for param in model.parameters()])
        return backward(model, data)

    optimizer.step(closure)
    assert len(weights) > 1
    # The first direction is the projected gradient's: orthogonal to the weights.
    for before, after in zip(weights[0], weights[1], strict=True):
        step = (after - before).flatten().double()
        assert step.norm() > 0
        assert step.dot(before.flatten().double()).abs() <= 1e-5 * step.norm() * before.norm()


@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler(device: torch.device, clip: bool) -> None:
    model, data = model_and_data(device)
    twin = copy.deepcopy(model)
    optimizer = OrthoGrad(model.parameters(), torch.optim.AdamW, lr=0.1, fused=True)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.1, fused=True)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(data).square().mean()).backward()
        overflow = step == 1
        if overflow:
            next(model.parameters()).grad[0, 0] = float("inf")
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        before = [param.detach().clone() for param in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert scaler.get_scale() == 512.0
            assert_same([param.detach() for param in model.parameters()], before)
        else:
            plain.zero_grad()
            backward(twin, data)
            if clip:
                torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
            orthogonalize_gradients_(twin.parameters())
            plain.step()
            for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(ours, expected)


def test_zero_grad(device: torch.device) -> None:
    model, data = model_and_data(device)
    optimizer = OrthoGrad(model.parameters())
    backward(model, data)
    optimizer.zero_grad(set_to_none=False)
    assert not any(param.grad.any() for param in model.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_hooks(device: torch.device) -> None:
    model, data = model_and_data(device)
    optimizer = OrthoGrad(model.parameters(), lr=0.1)
    backward(model, data)
    raw = [param.grad.clone() for param in model.parameters()]
    seen: list[str] = []

    def before(hooked: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert hooked is optimizer
        assert_same([param.grad for param in model.parameters()], raw)
        seen.append("before")

    def add_tag(hooked: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "tag": 1}

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(add_tag)
    optimizer.register_load_state_dict_pre_hook(lambda hooked, state: seen.append(f"load {state['tag']}"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "load 1"]


def test_named_parameters(device: torch.device) -> None:
    model, data = model_and_data(device)
    optimizer = OrthoGrad(model.named_parameters(), torch.optim.AdamW, lr=0.1)
    train(model, data, optimizer, 1)
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_parameters_without_gradients_are_left_out(device: torch.device) -> None:
    model, data = model_and_data(device)
    model[0].requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    train(model, data, OrthoGrad(model.parameters(), lr=0.1), 2)
    assert torch.equal(model[0].weight, frozen)


@pytest.mark.needs_compiler
def test_compiled_step(device: torch.device) -> None:
    model, data = model_and_data(device)
    twin = copy.deepcopy(model)
    optimizer = OrthoGrad(model.parameters(), torch.optim.AdamW, lr=0.1)
    step = torch.compile(optimizer.step)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, data)
        step()
    expected = train(twin, data, torch.optim.AdamW(twin.parameters(), lr=0.1), 3, project=True)
    for param, plain in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.detach(), plain)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.nn.Linear,), {}, TypeError, r"OrthoGrad: expected base_optimizer_cls to be a subclass .* got <class"),
        (("adam",), {}, TypeError, r"OrthoGrad: expected base_optimizer_cls .* got 'adam'; pass the class"),
        ((torch.optim.SGD,), {"differentiable": True}, ValueError, r"expected differentiable=False, got True"),
        ((torch.optim.SGD,), {"betas": (0.9, 0.9)}, TypeError, "betas"),
    ],
)
def test_constructor_errors(arguments: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OrthoGrad([torch.nn.Parameter(torch.ones(2))], *arguments, **options)


def test_a_differentiable_group_is_refused_later_too() -> None:
    optimizer = OrthoGrad([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="differentiable=False"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "differentiable": True})


def test_an_empty_gradient_may_have_any_strides() -> None:
    """torch leaves strides of 0 to what it makes of empty tensors."""
    param = torch.zeros(2, 0, 1, requires_grad=True)
    param.grad = 2 * torch.zeros(2, 0, 1)
    assert param.grad.stride()[0] == 0
    orthogonalize_gradients_(param)
    assert param.grad.shape == (2, 0, 1)


# ---- single steps, of shards in several processes ----


@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_on_shards_give_what_the_whole_gives(device: torch.device, dtype: torch.dtype, is_parallel: bool) -> None:
    """Sums over the shards of each parameter, added up between the steps, stand for those over the parameter."""
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 40000, 17000]  # less than a chunk, some chunks, and a bit more than one
    cuts = [1, 23456, 16384]
    weights = [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]
    grads = [torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]
    if is_parallel:
        grads = [weight * 3 + 1e-5 * grad for weight, grad in zip(weights, grads, strict=True)]
    weights, grads = ([part.to(device, dtype) for part in parts] for parts in (weights, grads))
    whole = [grad.clone() for grad in grads]
    ops = torch.ops.pyreg
    ops.orthogonalize_gradients_(weights, whole)

    def shards(parts: list[Tensor]) -> list[list[Tensor]]:
        return [
            [part[:cut] for part, cut in zip(parts, cuts, strict=True)],
            [part[cut:] for part, cut in zip(parts, cuts, strict=True)],
        ]

    halves = list(zip(shards(weights), shards(grads), strict=True))
    sums = sum(ops.orthograd_sums(*half) for half in halves)
    residuals = sum(ops.orthograd_residuals(*half, sums) for half in halves)
    # Of many elements, of which the rounding of bfloat16 keeps gradients from being nearly parallel.
    assert ((residuals[1:] > 0) == (is_parallel and dtype != torch.bfloat16)).all()
    for half in halves:
        ops.orthograd_update_(*half, sums, residuals)
    exact = [weight.double().square().sum() for weight in weights]
    torch.testing.assert_close(sums[:, 0], torch.stack(exact), rtol=1e-14, atol=0.0)
    for ours, expected in zip(grads, whole, strict=True):
        # one chunk is cut in two: sums in another order, of which a parallel gradient loses ten digits
        scale = expected.double().abs().max().item()
        tolerance = max(1e-9 if is_parallel else 1e-14, torch.finfo(dtype).eps) * scale
        torch.testing.assert_close(ours, expected, rtol=0.0, atol=tolerance)


def test_steps_refuse_what_does_not_fit(device: torch.device) -> None:
    weights, grads = [torch.ones(3, device=device)], [torch.ones(3, device=device)]
    sums, ops = torch.ones(1, 3, dtype=torch.float64, device=device), torch.ops.pyreg
    with pytest.raises(ValueError, match="expected sums of 3 float64 numbers"):
        ops.orthograd_residuals(weights, grads, sums.float())
    with pytest.raises(ValueError, match="expected residuals of 1 float64 numbers"):
        ops.orthograd_update_(weights, grads, sums, sums)
    with pytest.raises(ValueError, match="expected shards that have elements"):
        ops.orthograd_sums([torch.ones(0, device=device)], [torch.ones(0, device=device)])
