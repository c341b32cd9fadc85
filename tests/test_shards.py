"""What ranks of a process group compute of their shards: two processes against one.

Classes of a cross-entropy, parameters of an optimizer, rows of a transport problem.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import pyreg
from pyreg.functional import sinkhorn_points, stablemax_cross_entropy
from pyreg.optim import OrthoGrad, orthogonalize_gradients_
from pyreg.transport import Transport
from tests.ranks import RANKS, found_by_ranks, message_of


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- classes ----


def own_classes(classes: int, rank: int) -> slice:
    per_rank = -(-classes // RANKS)
    return slice(min(rank * per_rank, classes), min((rank + 1) * per_rank, classes))


def logits_of(rows: int, classes: int, inner: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and class weights; a row is ignored, one has a dominant target, one is masked but for two."""
    logits = 4 * numbers(rows, classes)
    target = torch.arange(rows) * 7 % classes
    logits[2, target[2]] = 1e9
    logits[3] = -math.inf
    logits[3, [0, target[3]]] = 0.5
    target[1] = -100
    logits[1] = math.nan
    if inner is not None:
        logits = torch.stack([logits, logits.flip(1)], 2)[..., :inner]
        target = torch.stack([target, (classes - 1 - target).where(target >= 0, -100)], 1)[:, :inner]
    return logits.to(dtype), target, (numbers(classes).abs() + 0.1).to(dtype)


CLASS_CASES = {
    f"{classes}-{reduction}-{smoothing}{'-weights' if weighted else ''}{'-inner' if inner else ''}": (
        *(classes, reduction, smoothing, weighted, inner),
    )
    for classes in (1, 2, 11, 9000)
    for reduction, smoothing, weighted, inner in (
        ("mean", 0.0, False, None),
        ("none", 0.0, True, None),
        ("sum", 0.1, True, None),
        ("mean", 0.2, False, 2),
        ("none", 0.1, True, 2),
    )
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def loss_and_gradient(name: str, dtype: torch.dtype, rank: int | None) -> tuple[Tensor, Tensor]:
    classes, reduction, smoothing, weighted, inner = CLASS_CASES[name]
    logits, target, weight = logits_of(6, classes, inner, dtype)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    if rank is not None:
        own = own_classes(classes, rank)
        logits, weight = logits[:, own], weight[own]
        options |= {"group": True, "num_classes": classes}
    logits = logits.clone().requires_grad_()
    loss = stablemax_cross_entropy(logits, target, weight if weighted else None, **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, logits, upstream)[0]


def run_classes(rank: int, found: dict[str, Any]) -> None:
    for name in CLASS_CASES:
        for dtype in DTYPES:
            found[f"{name}-{dtype}"] = loss_and_gradient(name, dtype, rank)
    logits, target, _ = logits_of(6, 10, None, torch.float64)
    own = logits[:, own_classes(10, rank)].nan_to_num(0).requires_grad_()
    compiled = torch.compile(lambda x: stablemax_cross_entropy(x, target, group=True), fullgraph=True, backend="eager")
    found["compiled"] = compiled(own), stablemax_cross_entropy(own, target, group=True)
    module = pyreg.nn.StableMaxCrossEntropyLoss(group=dist.group.WORLD, num_classes=10)
    found["module"] = module(own, target).detach()
    loss = stablemax_cross_entropy(own, target, group=True)
    found["class errors"] = [
        message_of(lambda: stablemax_cross_entropy(own[:, : 5 - rank], target, group=True)),
        message_of(lambda: stablemax_cross_entropy(own, target, group=True, num_classes=12 + rank)),
        message_of(lambda: stablemax_cross_entropy(own, target + 10, group=True)),
        message_of(lambda: stablemax_cross_entropy(own, own.detach().softmax(1), group=True)),
        message_of(lambda: torch.autograd.grad(loss, own, create_graph=True)),
        message_of(lambda: torch.func.vmap(lambda x: stablemax_cross_entropy(x, target[0], group=True))(own)),
    ]


# ---- parameters ----

PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}
SHAPES = ((5, 300), (1, 7), (301, 401))


def weight_and_gradient(shape: tuple[int, ...], is_parallel: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, gradient = numbers(*shape, seed=1), numbers(*shape, seed=2)
    if is_parallel:
        gradient = 3 * weight + 1e-5 * gradient
    return weight.to(dtype), gradient.to(dtype)


def run_placements(mesh: Any, found: dict[str, Any]) -> None:
    params: dict[str, torch.nn.Parameter] = {}
    for dtype in DTYPES:
        for name, placement in PLACEMENTS.items():
            for shape in SHAPES:
                for is_parallel in (False, True):
                    weight, gradient = weight_and_gradient(shape, is_parallel, dtype)
                    param = torch.nn.Parameter(distribute_tensor(weight, mesh, [placement]))
                    param.grad = distribute_tensor(gradient, mesh, [placement])
                    params[f"{name}-{shape}-{is_parallel}-{dtype}"] = param
    orthogonalize_gradients_(params.values())  # in one call, in two groups
    for name, param in params.items():
        found[name] = param.grad.full_tensor()


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(40, 513),
        torch.nn.ReLU(),
        torch.nn.Linear(513, 7),
        torch.nn.Tanh(),
        torch.nn.Linear(7, 1),
    ]
    return torch.nn.Sequential(*layers).double()


def trained(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    optimizer = OrthoGrad(model.parameters(), torch.optim.AdamW, lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
    return [param.full_tensor() if isinstance(param, DTensor) else param.detach() for param in model.parameters()]


def run_parameters(rank: int, found: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    run_placements(mesh, found)
    model = network()
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    half = slice(8 * rank, 8 * (rank + 1))
    found["fsdp"] = trained(model, numbers(16, 40)[half], numbers(16, 1)[half])

    def sharded(placement: Placement) -> torch.nn.Parameter:
        return torch.nn.Parameter(DTensor.from_local(numbers(3, 4), mesh, [placement]))

    expanded = sharded(Shard(0))
    expanded.sum().backward()
    orthogonalize_gradients_(expanded)
    found["expanded"] = expanded.full_tensor().detach(), expanded.grad.full_tensor()
    summed = sharded(Replicate())
    summed.grad = DTensor.from_local(numbers(3, 4, seed=5) / RANKS, mesh, [Partial()])
    orthogonalize_gradients_(summed)
    found["partial gradient"] = summed.grad.full_tensor()
    whole = sharded(Partial())
    whole.grad = DTensor.from_local(numbers(3, 4), mesh, [Replicate()])
    found["partial parameter"] = message_of(lambda: orthogonalize_gradients_(whole))


# ---- rows of points ----

CUT = 25  # of 41 rows, those of the first rank
POINT_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unbalanced": {"rho_a": 1.0, "rho_b": 2.0},
    "semi-relaxed": {"rho_b": 0.5},
    "counting": {"rho_a": 1.0, "rho_b": 2.0, "reference": "counting"},
    "staged": {"epsilon_scaling": 0.5},
    "relative": {"epsilon": None, "relative_epsilon": 0.2},
    "euclidean": {"cost": "euclidean"},
    "cosine": {"cost": "cosine", "epsilon": 0.2},
    "batched": {},
    "first iterations": {"max_iter": 7, "tol": 0.0},
    "in float32": {"tol": 1e-5},
}


def clouds(name: str) -> list[Tensor]:
    """x, y, a and b; three weights are 0."""
    batch = (2,) if name == "batched" else ()
    x, y = numbers(*batch, 41, 3, seed=1), numbers(*batch, 30, 3, seed=2) + 0.3
    a, b = numbers(*batch, 41, seed=3).abs() + 0.1, numbers(*batch, 30, seed=4).abs() + 0.1
    a[..., [5, 30]], b[..., 7] = 0, 0
    dtype = torch.float32 if name == "in float32" else torch.float64
    return [part.to(dtype) for part in (x, y, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))]


def of_rank(tensor: Tensor, rank: int, dim: int) -> Tensor:
    count = tensor.shape[dim]
    return tensor.narrow(dim, *((0, CUT) if rank == 0 else (CUT, count - CUT)))


def solved(name: str, rank: int | None) -> dict[str, Tensor]:
    """Everything that a transport has, and its value's gradients."""
    tensors = clouds(name)
    z = numbers(*tensors[2].shape, 2, seed=6).to(tensors[0].dtype)
    options: dict[str, Any] = {"epsilon": 0.3, "tol": 1e-12, "max_iter": 3000} | POINT_CASES[name]
    if rank is not None:
        tensors[0], tensors[2], z = (
            of_rank(part, rank, d) for part, d in ((tensors[0], -2), (tensors[2], -1), (z, -2))
        )
        options["group"] = True
    leaves = [part.clone().requires_grad_() for part in tensors]
    transport = sinkhorn_points(*leaves, **options)
    upstream = torch.linspace(0.5, 1.5, transport.value.numel(), dtype=z.dtype).view(transport.value.shape)
    gradients = torch.autograd.grad(transport.value, leaves, upstream)
    found = dict(zip(("by x", "by y", "by a", "by b"), gradients, strict=True))
    with torch.no_grad():
        rows, columns = transport.marginals
        plan = transport.plan()
        assert isinstance(plan, Tensor)
        found |= {"value": transport.value, "f": transport.f, "g": transport.g, "plan": plan, "rows": rows}
        found |= {"columns": columns, "transported": transport.apply_transpose(z), "cost": transport.transport_cost()}
        found |= {"map": transport.barycentric_map(), "iterations": transport.n_iter, "error": transport.marginal_error}
    return {key: result.detach() for key, result in found.items()}


OF_ROWS = {"by x": -2, "by a": -1, "f": -1, "plan": -2, "rows": -1, "map": -2}  # and their dimension of rows


def run_points(rank: int, found: dict[str, Any]) -> None:
    for name in POINT_CASES:
        found[name] = solved(name, rank)
    x, y, *_ = clouds("plain")
    own = of_rank(x, rank, -2).clone().requires_grad_()

    def together(*arguments: Tensor, **options: Any) -> Transport:
        return sinkhorn_points(*arguments, **({"epsilon": 0.3, "group": True} | options))

    transport = together(own, y)
    weights = torch.ones(len(own), dtype=x.dtype) * rank
    found["uniform"] = transport.value.detach(), repr(transport)
    found["one rank has all weight"] = together(own, y, weights / 16).value.detach()
    found["point errors"] = [
        message_of(lambda: transport.f.sum().backward()),
        message_of(lambda: transport.plan().sum().backward()),  # type: ignore[union-attr]
        message_of(lambda: torch.autograd.grad(transport.value, own, create_graph=True)),
        message_of(lambda: together(own * (math.nan if rank == 0 else 1), y)),
        message_of(lambda: together(own, y[rank:])),
        message_of(lambda: together(own, y, 0 * weights)),
        message_of(lambda: together(own, y, streaming=False)),
        message_of(lambda: together(own, y, cost=torch.cdist)),
        message_of(lambda: together(own, y, x_offsets=[0, len(own)])),
    ]


# ---- two processes, and what they found ----


def run_rank(rank: int, found: dict[str, Any]) -> None:
    run_classes(rank, found)
    run_parameters(rank, found)
    run_points(rank, found)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found_by_ranks(run_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLASS_CASES)
def test_cross_entropy_of_classes_on_two_ranks(ranks: list[dict[str, Any]], name: str, dtype: torch.dtype) -> None:
    loss, gradient = loss_and_gradient(name, dtype, None)
    # What the kernels save of a row has the accumulation dtype's rounding, in the sum and in the rest; the results have
    # their own dtype's.
    rounding = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps
    # Under label smoothing a loss has the difference of two logarithms of up to 1e9, of at most 12 rows.
    smoothing = CLASS_CASES[name][2]
    for rank in range(RANKS):
        own_loss, own_gradient = ranks[rank][f"{name}-{dtype}"]
        torch.testing.assert_close(own_loss, loss, rtol=rounding, atol=rounding * smoothing * 12 * math.log(1e9))
        expected = gradient[:, own_classes(CLASS_CASES[name][0], rank)]
        # An element is the sum of two terms, each of at most the row's largest.
        largest = gradient.double().abs().amax(1, keepdim=True)
        assert ((own_gradient.double() - expected.double()).abs() <= rounding * largest).all()
    assert ranks[0][f"{name}-{dtype}"][0].equal(ranks[1][f"{name}-{dtype}"][0])


def test_cross_entropy_of_classes_compiled_and_as_a_module(ranks: list[dict[str, Any]]) -> None:
    logits, target, _ = logits_of(6, 10, None, torch.float64)
    expected = stablemax_cross_entropy(logits, target)
    for rank in range(RANKS):
        compiled, eager = ranks[rank]["compiled"]
        assert compiled.equal(eager)
        assert ranks[rank]["module"].equal(eager)
        torch.testing.assert_close(eager, expected, rtol=1e-14, atol=0.0)


def test_misuse_of_classes_is_told(ranks: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        uneven, other, beyond, probabilities, second, vmapped = ranks[rank]["class errors"]
        assert f"expected ranks of group to have {10 - 2 * rank} classes together, got 9" in uneven
        assert f"expected input with {6 + rank if rank == 0 else 6} of num_classes = {12 + rank} classes" in other
        assert "target has class" in beyond
        assert "input with 10 classes" in beyond
        assert "expected class indices in target with group" in probabilities
        assert "with group there are gradients of first order alone" in second
        assert "with group there is no vmap" in vmapped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_orthogonal_gradients_of_dtensors(
    ranks: list[dict[str, Any]], name: str, shape: tuple[int, ...], is_parallel: bool, dtype: torch.dtype
) -> None:
    weight, gradient = weight_and_gradient(shape, is_parallel, dtype)
    param = torch.nn.Parameter(weight)
    param.grad = gradient.clone()
    orthogonalize_gradients_(param)
    assert not param.grad.equal(gradient)
    # float64 sums in another order; a gradient that is parallel but for 1e-5 loses as many digits of its direction
    tolerance = 1e-10 if is_parallel else 1e-14
    for rank in range(RANKS):
        found = ranks[rank][f"{name}-{shape}-{is_parallel}-{dtype}"]
        scale = param.grad.double().abs().max()
        assert (found.double() - param.grad.double()).abs().max() <= max(tolerance, torch.finfo(dtype).eps) * scale


def test_orthograd_trains_fsdp_models_as_whole_ones(ranks: list[dict[str, Any]]) -> None:
    expected = trained(network(), numbers(16, 40), numbers(16, 1))
    for rank in range(RANKS):
        # float64 through ten steps of AdamW, whose first ones divide gradients by their own size
        torch.testing.assert_close(ranks[rank]["fsdp"], expected, rtol=1e-7, atol=1e-9)


def test_gradients_of_dtensors_that_lie_elsewhere(ranks: list[dict[str, Any]]) -> None:
    local = numbers(3, 4)
    for rank in range(RANKS):
        weight, gradient = ranks[rank]["expanded"]
        param = torch.nn.Parameter(torch.cat([local, local]))
        param.grad = torch.ones_like(param)
        orthogonalize_gradients_(param)
        torch.testing.assert_close(weight, param.detach(), rtol=0, atol=0)
        torch.testing.assert_close(gradient, param.grad, rtol=1e-13, atol=1e-14)
        param = torch.nn.Parameter(local)
        param.grad = numbers(3, 4, seed=5)
        orthogonalize_gradients_(param)
        torch.testing.assert_close(ranks[rank]["partial gradient"], param.grad, rtol=1e-13, atol=1e-14)
        assert "expected parameters that are sharded or replicated" in ranks[rank]["partial parameter"]


@pytest.mark.parametrize("name", POINT_CASES)
def test_transport_between_rows_on_two_ranks(ranks: list[dict[str, Any]], name: str) -> None:
    expected = solved(name, None)
    # The iteration is the same but for the order of sums over rows, which a rank more or less changes by rounding; what
    # follows has the problem's condition, 1 / epsilon times the costs' range, some hundred.
    tolerance = 2e-5 if name == "in float32" else 1e-10
    for rank in range(RANKS):
        found = ranks[rank][name]
        assert found.keys() == expected.keys()
        for key, whole in expected.items():
            own = of_rank(whole, rank, OF_ROWS[key]) if key in OF_ROWS else whole
            if key == "iterations":
                assert (found[key] - own).abs().max() <= (1 if POINT_CASES[name].get("tol") != 0 else 0)
            elif key == "error":
                assert (found[key] - own).abs().max() <= (1e-5 if name == "in float32" else 1e-11)
            else:
                scale = whole[whole.isfinite()].abs().max().item()
                torch.testing.assert_close(
                    found[key], own, rtol=0.0, atol=tolerance * scale, msg=lambda m, k=key: f"{k}: {m}"
                )
        for key in expected.keys() - OF_ROWS.keys():
            assert ranks[0][name][key].equal(ranks[1][name][key]), key


def test_rows_without_weights_given(ranks: list[dict[str, Any]]) -> None:
    x, y, *_ = clouds("plain")
    value = sinkhorn_points(x, y, epsilon=0.3).value
    of_second = sinkhorn_points(x[CUT:], y, epsilon=0.3).value
    for rank in range(RANKS):
        found, text = ranks[rank]["uniform"]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=0.0)  # both to tol = 1e-6
        assert text.startswith(f"Transport(n={(25, 16)[rank]} of 41, m=30, reference='product', converged after")
        torch.testing.assert_close(ranks[rank]["one rank has all weight"], of_second, rtol=1e-6, atol=0.0)


def test_misuse_of_rows_is_told(ranks: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        potentials, plan, second, nan, columns, weights, streaming, cost, offsets = ranks[rank]["point errors"]
        assert "sinkhorn_points: with group, of what is found only value has a gradient" in potentials
        assert potentials == plan
        assert "with group there are gradients of first order alone" in second
        assert ("got nan", "rank 0 of group has refused its arguments")[rank] in nan
        assert "['m=30, d=3, 64 bits, 1 problems', 'm=29, d=3, 64 bits, 1 problems']" in columns
        assert "expected a with a weight above 0 in every problem, got all 0" in weights
        assert "expected streaming=True or None with group" in streaming
        assert "expected cost to be 'sqeuclidean', 'euclidean' or 'cosine' with group, got a function" in cost
        assert "x_offsets with group" in offsets


def test_group_without_processes() -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, 2, 4])
    message = "needs torch.distributed.init_process_group to have been called"
    for call in (
        lambda: stablemax_cross_entropy(logits, target, group=True),
        lambda: sinkhorn_points(logits, logits, epsilon=0.1, group=True),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="num_classes goes with group"):
        stablemax_cross_entropy(logits, target, num_classes=5)
