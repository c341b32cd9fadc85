"""CompandedOptimizer: the paper's rule against a loop by hand, and all that torch does with an optimizer."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import pyreg
from pyreg.optim import CompandedOptimizer
from tests.oracle import relative_error

KINDS = ("arctan", "arsinh", "erf")
A, B = 1.1, -0.8


def network(device: torch.device, dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).to(device, dtype)


def batch(device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(16, 3, device=device, dtype=dtype), torch.randn(16, 2, device=device, dtype=dtype)


def companded(device: torch.device, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    model = network(device, dtype)
    pyreg.compand(model, **{"a": A, "b": B, "learnable": False, **options})
    return model


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return (model(data[0]) - data[1]).square().sum()


def backward(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    model.zero_grad()
    loss = loss_of(model, data)
    loss.backward()
    return loss


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, steps: int = 4
) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(backward(model, data).item())
        optimizer.step()
    return losses


def assert_same_parameters(model: nn.Module, twin: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, ours), (other, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other
        assert relative_error(ours, theirs) <= tolerance, name


# ---- the rule, by hand ----


def shaped(constant: Tensor | float) -> Tensor | float:
    return constant[:, None] if isinstance(constant, Tensor) and constant.dim() else constant


def psi(v: Tensor, a: Tensor | float, b: Tensor | float, kind: str) -> Tensor:
    u = v / shaped(b)
    return shaped(a) * {"arctan": torch.atan, "arsinh": torch.asinh, "erf": torch.erf}[kind](u)


def slope(v: Tensor, a: Tensor | float, b: Tensor | float, kind: str) -> Tensor:
    """As cos^2 of the angle, 1 / cosh of the hyperbolic one, the density of a Gaussian."""
    a, b = shaped(a), shaped(b)
    u = v / b
    if kind == "arctan":
        return a / b * torch.cos(torch.atan(u)) ** 2
    if kind == "arsinh":
        return a / b / torch.cosh(torch.asinh(u))
    return a / b * 2 * math.sqrt(2) * torch.distributions.Normal(0.0, 1.0).log_prob(math.sqrt(2) * u).exp()


class ByHand:
    """Adam on dL/dw with its steps times Psi'(v), plain Adam on the rest, in numbers of its own."""

    def __init__(self, model: nn.Module, plain: nn.Module, kind: str, decay: float, decay_on: str, lr: float) -> None:
        self.plain, self.kind, self.decay, self.decay_on, self.lr = plain, kind, decay, decay_on, lr
        self.values = {name: p.detach().clone() for name, p in (*model.named_parameters(), *model.named_buffers())}
        self.learned = {name for name, _ in model.named_parameters()}
        self.moments = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in self.values.items()}
        self.steps = 0

    def constants(self, name: str) -> tuple[Tensor, Tensor]:
        site = name.removesuffix("original")
        return self.values[f"{site}0.a"], self.values[f"{site}0.b"]

    def step(self, data: tuple[Tensor, Tensor]) -> None:
        values = {name: value.clone().requires_grad_(name in self.learned) for name, value in self.values.items()}
        weights = {}
        for name in values:
            if name.endswith(".original"):
                site = name.removesuffix("original")
                w = psi(values[name], values[f"{site}0.a"], values[f"{site}0.b"], self.kind)
                if w.requires_grad:
                    w.retain_grad()
                weights[name.replace("parametrizations.", "").removesuffix(".original")] = w
            elif ".parametrizations." not in name:
                weights[name] = values[name]
        output = functional_call(self.plain, weights, (data[0],))
        (output - data[1]).square().sum().backward()
        self.steps += 1
        new = {}
        for name, value in self.values.items():
            if name not in self.learned:
                continue
            gradient, factor = values[name].grad, 1.0
            if name.endswith(".original"):
                factor = slope(value, *self.constants(name), self.kind)
                w = weights[name.replace("parametrizations.", "").removesuffix(".original")]
                gradient = w.grad + (
                    2 * self.decay * w.detach() if self.decay_on == "w" else 2 * self.decay * value / factor
                )
            mean, square = self.moments[name]
            mean.mul_(0.9).add_(0.1 * gradient)
            square.mul_(0.999).add_(0.001 * gradient**2)
            step = mean / (1 - 0.9**self.steps) / ((square / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            new[name] = value - self.lr * factor * step
        self.values.update(new)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("decay", "decay_on"), [(0.0, "w"), (0.05, "w"), (0.05, "v")])
@pytest.mark.parametrize("options", [{"learnable": False}, {"per": "layer"}, {"per": "channel"}], ids=str)
def test_adam_by_hand(device: torch.device, options: Any, decay: float, decay_on: str, kind: str) -> None:
    """With learned a and b in the same optimizer, steps are scaled by the slope of those before the step."""
    model, data = network(device), batch(device)
    plain = copy.deepcopy(model)
    pyreg.compand(model, a=A, b=B, kind=kind, **{"learnable": True, **options})
    by_hand = ByHand(model, plain, kind, decay, decay_on, lr=0.05)
    optimizer = CompandedOptimizer(model.parameters(), model, lr=0.05, decay=decay, decay_on=decay_on)
    for _ in range(6):
        backward(model, data)
        optimizer.step()
        by_hand.step(data)
    for name, param in model.named_parameters():
        assert relative_error(param, by_hand.values[name]) <= 1e-10, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("decay", "decay_on"), [(0.0, "w"), (0.05, "w"), (0.05, "v")])
@pytest.mark.parametrize("maximize", [False, True])
def test_plain_sgd_is_plain_sgd_on_v(
    device: torch.device, maximize: bool, decay: float, decay_on: str, kind: str
) -> None:
    """... of the loss plus decay sum w^2 or decay sum v^2, for the factors Psi' cancel."""
    model, data = companded(device, kind=kind), batch(device)
    twin = copy.deepcopy(model)
    wrapped = CompandedOptimizer(
        model.parameters(), model, torch.optim.SGD, lr=0.01, decay=decay, decay_on=decay_on, maximize=maximize
    )
    plain = torch.optim.SGD(twin.parameters(), lr=0.01)
    sign = -1 if maximize else 1
    for _ in range(5):
        model.zero_grad()
        (sign * loss_of(model, data)).backward()
        wrapped.step()
        twin.zero_grad()
        weights = [layer.weight if decay_on == "w" else layer.parametrizations.weight.original for layer in twin[::2]]
        (loss_of(twin, data) + decay * sum(weight.square().sum() for weight in weights)).backward()
        plain.step()
    assert_same_parameters(model, twin)


BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.0}),
    "Adam, fused": (torch.optim.Adam, {"lr": 0.02, "fused": True}),
    "Adam, foreach, amsgrad": (torch.optim.Adam, {"lr": 0.02, "foreach": True, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}


@pytest.mark.parametrize("base", BASES)
def test_is_the_base_optimizer_on_weight_gradients(device: torch.device, base: str) -> None:
    cls, options = BASES[base]
    model, data = companded(device), batch(device)
    twin = copy.deepcopy(model)
    train(model, data, CompandedOptimizer(model.parameters(), model, cls, **options), 5)
    plain = cls(twin.parameters(), **options)
    for _ in range(5):
        backward(twin, data)
        before = {name: p.detach().clone() for name, p in twin.named_parameters()}
        slopes = {name: slope(p, A, B, "arctan") for name, p in before.items() if name.endswith(".original")}
        params = dict(twin.named_parameters())
        for name, factor in slopes.items():
            params[name].grad.div_(factor)
        plain.step()
        with torch.no_grad():
            for name, factor in slopes.items():
                params[name].copy_(before[name] + (params[name] - before[name]) * factor)
    assert_same_parameters(model, twin, 1e-10)


def test_large_weights_take_smaller_steps(device: torch.device) -> None:
    """The first step of Adam has the size lr wherever the gradient is: on v it becomes lr Psi'(v)."""
    model, data = companded(device), batch(device)
    vs = [layer.parametrizations.weight.original for layer in model[::2]]
    before = [v.detach().clone() for v in vs]
    train(model, data, CompandedOptimizer(model.parameters(), model, lr=1e-3), 1)
    for v, old in zip(vs, before, strict=True):
        torch.testing.assert_close((v.detach() - old).abs(), 1e-3 * slope(old, A, B, "arctan").abs(), rtol=1e-4, atol=0)


def test_the_gradient_is_that_of_w_after_the_step(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    seen: list[Tensor] = []
    backward(model, data)
    v = model[0].parametrizations.weight.original
    before = v.detach().clone()
    expected = v.grad / slope(before, A, B, "arctan")
    optimizer = CompandedOptimizer(model.parameters(), model, lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: seen.append(v.grad.clone()))
    optimizer.step()
    assert relative_error(v.grad, expected) <= 1e-14
    assert relative_error(seen[0] / v.grad, slope(before, A, B, "arctan")) <= 1e-12  # the hook saw that of v


def test_tied_weights(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).to(device, torch.float64)
    model[2].weight = model[0].weight
    pyreg.compand(model, a=A, b=B, learnable=False)
    twin = copy.deepcopy(model)
    data = (torch.randn(4, 3, device=device, dtype=torch.float64),) * 2
    train(model, data, CompandedOptimizer(model.parameters(), model, torch.optim.SGD, lr=0.01))
    train(twin, data, torch.optim.SGD(twin.parameters(), lr=0.01))
    assert_same_parameters(model, twin)


# ---- as an optimizer of torch ----


def test_groups_have_options_of_their_own(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    twin = copy.deepcopy(model)

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        first, second = (network[i].parametrizations.weight.original for i in (0, 2))
        return [{"params": [first], "lr": 0.02, "decay": 0.1}, {"params": [second], "decay": 0.2, "decay_on": "v"}]

    optimizer = CompandedOptimizer(groups(model), model, torch.optim.SGD, lr=0.01, decay=0.3)
    optimizer.add_param_group({"params": [model[4].parametrizations.weight.original], "lr": 0.005})
    optimizer.add_param_group({"params": [layer.bias for layer in model[::2]], "weight_decay": 0.01})
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01, 0.005, 0.01]
    plain = torch.optim.SGD(groups(twin), lr=0.01)
    plain.add_param_group({"params": [twin[4].parametrizations.weight.original], "lr": 0.005})
    plain.add_param_group({"params": [layer.bias for layer in twin[::2]], "weight_decay": 0.01})
    for _ in range(4):
        backward(model, data)
        optimizer.step()
        twin.zero_grad()
        v = twin[2].parametrizations.weight.original
        penalty = 0.1 * twin[0].weight.square().sum() + 0.2 * v.square().sum() + 0.3 * twin[4].weight.square().sum()
        (loss_of(twin, data) + penalty).backward()
        plain.step()
    assert_same_parameters(model, twin)


def test_learned_constants_in_an_optimizer_of_their_own(device: torch.device) -> None:
    """The paper's setting: Adam for the weights, plain SGD for a and b."""
    model, data = network(device), batch(device)
    companding = pyreg.compand(model, a=A, b=B)
    constants = {id(constant) for constant in companding.constants}
    rest = [param for param in model.parameters() if id(param) not in constants]
    optimizer = CompandedOptimizer(rest, model, lr=0.02)
    sgd = torch.optim.SGD(companding.constants, lr=0.001)
    before = [constant.detach().clone() for constant in companding.constants]
    losses = []
    for _ in range(30):
        losses.append(backward(model, data).item())
        optimizer.step()
        sgd.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all((new - old).abs() > 0 for new, old in zip(companding.constants, before, strict=True))


@pytest.mark.parametrize("through", ["memory", "file"])
def test_a_run_continues_from_a_state_dict(device: torch.device, through: str) -> None:
    model, data = companded(device), batch(device)
    optimizer = CompandedOptimizer(model.parameters(), model, lr=0.02, decay=0.01)
    train(model, data, optimizer)
    states = [copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())]
    if through == "file":
        file = io.BytesIO()
        torch.save(states, file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
    expected = train(model, data, optimizer)
    other = companded(device)
    other.load_state_dict(states[0])
    continued = CompandedOptimizer(other.parameters(), other, lr=1.0, decay=0.01)
    continued.load_state_dict(states[1])
    assert train(other, data, continued) == expected
    assert_same_parameters(other, model, 0.0)


def test_state_dicts_are_those_of_the_base_optimizer(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    optimizer = CompandedOptimizer(model.parameters(), model, lr=0.02)
    train(model, data, optimizer)
    plain = torch.optim.Adam(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["lr"] == 0.02
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state is optimizer.base_optimizer.state
    assert all(value["step"] == 4 for value in optimizer.state.values())


def test_deepcopy_with_the_model_is_independent(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    optimizer = CompandedOptimizer(model.parameters(), model, lr=0.02, decay=0.01, decay_on="v")
    train(model, data, optimizer)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert (twin_optimizer.decay, twin_optimizer.decay_on) == (0.01, "v")
    before = [param.detach().clone() for param in model.parameters()]
    losses = train(twin, data, twin_optimizer)
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    assert train(model, data, optimizer) == losses
    assert_same_parameters(model, twin, 0.0)
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(optimizer)


def test_schedulers(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    optimizer = CompandedOptimizer(model.parameters(), model, torch.optim.SGD, lr=0.1, momentum=0.9)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5),
    ]
    rates = []
    for _ in range(4):
        train(model, data, optimizer, 1)
        for scheduler in schedulers:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) == 4
    assert optimizer.base_optimizer.param_groups[0]["lr"] == rates[-1]


def test_closure(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    twin = copy.deepcopy(model)
    optimizer = CompandedOptimizer(model.parameters(), model, lr=0.02)
    losses = []
    with torch.no_grad():  # the closure gets gradients nevertheless
        for _ in range(4):
            losses.append(optimizer.step(lambda: backward(model, data)).item())
    assert losses == train(twin, data, CompandedOptimizer(twin.parameters(), twin, lr=0.02))
    assert_same_parameters(model, twin, 0.0)


def test_several_evaluations_a_step_are_refused(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    optimizer = CompandedOptimizer(model.parameters(), model, torch.optim.LBFGS)
    with pytest.raises(RuntimeError, match="evaluates the closure once a step, got LBFGS"):
        optimizer.step(lambda: backward(model, data))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(device: torch.device, fused: bool) -> None:
    """A step that the scaler skips leaves parameters and moments; the others are those without scaling."""
    model, data = companded(device, torch.float32), batch(device, torch.float32)
    twin = copy.deepcopy(model)
    optimizer = CompandedOptimizer(model.parameters(), model, lr=0.02, fused=fused)
    plain = CompandedOptimizer(twin.parameters(), twin, lr=0.02, fused=fused)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, data)).backward()
        if step == 1:
            model[0].parametrizations.weight.original.grad[0, 0] = float("inf")
            before = [param.detach().clone() for param in model.parameters()]
            scaler.step(optimizer)
            assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
        else:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            backward(twin, data)
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            plain.step()
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same_parameters(model, twin, 1e-5)


def test_parameters_without_gradients_are_left_out(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    model[0].requires_grad_(False)
    v = model[0].parametrizations.weight.original
    before = v.detach().clone()
    optimizer = CompandedOptimizer(model.parameters(), model, lr=0.02)
    train(model, data, optimizer)
    assert torch.equal(v, before)
    optimizer.zero_grad(set_to_none=False)
    assert not any(param.grad.any() for param in model.parameters() if param.grad is not None)
    optimizer.zero_grad()
    optimizer.step()
    assert all(param.grad is None for param in model.parameters())


def test_a_decompanded_model_takes_the_steps_of_the_base_optimizer(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    optimizer = CompandedOptimizer(model.parameters(), model, torch.optim.SGD, lr=0.01, decay=0.1)
    pyreg.decompand(model)
    twin = copy.deepcopy(model)
    train(model, data, optimizer)
    train(twin, data, torch.optim.SGD(twin.parameters(), lr=0.01))
    assert_same_parameters(model, twin, 0.0)


def test_a_model_that_moves_to_another_dtype(device: torch.device) -> None:
    """The optimizer keeps memory of the size of the weights, which has to follow them."""
    model, data = companded(device), batch(device)
    optimizer = CompandedOptimizer(model.parameters(), model, torch.optim.SGD, lr=0.01)
    train(model, data, optimizer, 1)
    model.float()
    data = tuple(x.float() for x in data)
    twin = copy.deepcopy(model)
    train(model, data, optimizer)
    train(twin, data, torch.optim.SGD(twin.parameters(), lr=0.01))
    assert_same_parameters(model, twin, 1e-5)


def test_named_parameters_and_hooks(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    optimizer = CompandedOptimizer(model.named_parameters(), model, lr=0.02)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, data, optimizer, 1)
    assert seen == ["before", "after"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"][1] == "0.parametrizations.weight.original"
    assert repr(optimizer).startswith("CompandedOptimizer(Adam (")


def test_compiled_step(device: torch.device) -> None:
    model, data = companded(device, torch.float32), batch(device, torch.float32)
    twin = copy.deepcopy(model)
    optimizer = CompandedOptimizer(model.parameters(), model, lr=0.02, decay=0.01)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        backward(model, data)
        step()
    train(twin, data, CompandedOptimizer(twin.parameters(), twin, lr=0.02, decay=0.01), 3)
    assert_same_parameters(model, twin, 1e-5)


MODEL = nn.Linear(2, 2)


def make_companded() -> nn.Module:
    model = nn.Linear(2, 2)
    pyreg.compand(model)
    return model


def make(model: nn.Module, *args: Any, params: nn.Module | None = None, **options: Any) -> CompandedOptimizer:
    return CompandedOptimizer((params or model).parameters(), model, *args, **options)


ERRORS: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
    (lambda m: make(m, "adam"), TypeError, "CompandedOptimizer: expected base_optimizer_cls to be a subclass"),
    (
        lambda m: CompandedOptimizer([], torch.optim.Adam),
        TypeError,
        r"model to be the companded torch\.nn\.Module, got",
    ),
    (lambda m: make(m, params=MODEL), ValueError, "params with companded weights of the model, got none"),
    (lambda m: make(MODEL), ValueError, r"call pyreg\.compand\(model\) first"),
    (lambda m: make(m, decay=float("nan")), ValueError, "decay to be a finite number, got nan"),
    (lambda m: make(m, decay="1"), ValueError, "decay to be a finite number, got '1'"),
    (lambda m: make(m, decay_on="u"), ValueError, "decay_on to be 'w' or 'v', got 'u'"),
    (lambda m: make(m, torch.optim.AdamW), ValueError, r"weight_decay=0 .* got 0\.01, which AdamW would apply to v"),
    (lambda m: make(m, differentiable=True), ValueError, "differentiable=False, got True: the rescaling"),
    (lambda m: make(m).add_param_group({"params": [], "decay_on": "u"}), ValueError, "decay_on to be 'w' or 'v'"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call: Callable[[nn.Module], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make_companded())


def test_weight_decay_that_comes_later_is_refused(device: torch.device) -> None:
    model, data = companded(device), batch(device)
    optimizer = CompandedOptimizer(model.parameters(), model)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    backward(model, data)
    with pytest.raises(ValueError, match=r"expected weight_decay=0 in a group with companded weights, got 0\.1"):
        optimizer.step()
