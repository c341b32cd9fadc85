"""Companded models: what they compute, gradients against another formula, and all that torch does with a model."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import pyreg
from pyreg import _companded_weight
from pyreg.nn import WeightCompander
from tests.oracle import ROUNDOFF, relative_error

KINDS = ("arctan", "arsinh", "erf")
PER = ("layer", "channel", "model")


# ---- models ----


class ResNet(nn.Module):
    """Convolutions with batch norm, a residual block with a strided shortcut, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.shortcut = nn.Conv2d(4, 6, 1, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()
        return self.head(x.mean((2, 3)))


class LanguageModel(nn.Module):
    """An encoder layer between an embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        nn.init.uniform_(self.head.weight, -0.3, 0.3)
        self.embedding.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


class Attention(nn.Module):
    """Attention whose projections of queries, keys and values are three parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :5], x[..., :6])[0]


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3),  # [N, 2, 20]
        nn.Unflatten(2, (3, 6)),
        nn.ConvTranspose2d(4, 3, 2, stride=2),  # [N, 3, 6, 12]
        nn.Unflatten(3, (4, 3)),
        nn.Conv3d(3, 2, 2),  # [N, 2, 5, 3, 2]
        nn.ConvTranspose3d(2, 2, 2),  # [N, 2, 6, 4, 3]
        nn.Flatten(2),
        nn.ConvTranspose1d(2, 1, 3),
    )


class Case:
    def __init__(self, make: Callable[[], nn.Module], data: Callable[[], Tensor], weights: list[str]) -> None:
        self.make, self.data, self.weights = make, data, weights


CASES = {
    "resnet": Case(
        ResNet,
        lambda: torch.randn(4, 1, 8, 8),
        ["stem.weight", "conv1.weight", "conv2.weight", "shortcut.weight", "head.weight"],
    ),
    "language_model": Case(
        LanguageModel,
        lambda: torch.randint(11, (3, 7)),
        [
            "encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj.weight", "encoder.linear1.weight",
            "encoder.linear2.weight", "embedding.weight",
        ],
    ),
    "attention": Case(
        Attention,
        lambda: torch.randn(5, 3, 8),
        [f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")],
    ),
    "convolutions": Case(
        convolutions, lambda: torch.randn(3, 2, 20), ["0.weight", "2.weight", "4.weight", "5.weight", "7.weight"]
    ),
}  # fmt: skip


def make(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    model, data = CASES[name].make().to(device, dtype), CASES[name].data().to(device)
    return model, data.to(dtype) if data.is_floating_point() else data


def reach(model: nn.Module, kind: str = "arctan") -> dict[str, Any]:
    """Constants with which every weight of the models here is in range: none is beyond 1.2."""
    return {"a": 1.3, "b": -0.7, "kind": kind}


# ---- the formula once more ----


def psi(v: Tensor, a: Tensor, b: Tensor, kind: str) -> Tensor:
    """By other expressions than the reference's, so that autograd differentiates those."""
    a, b = (c.reshape(-1, *[1] * (v.dim() - 1)) if c.dim() else c for c in (a, b))
    if kind == "arctan":
        return a * torch.atan2(v * b.sign(), b.abs())
    if kind == "arsinh":
        return a * b.sign() * ((v.abs() + torch.hypot(v, b)) / b.abs()).log() * v.sign()
    return a * (1 - torch.erfc(v / b))


def plain_gradients(
    plain: nn.Module, companded: nn.Module, data: Tensor, kind: str, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients by name, from the model without companders and psi of the companded one's v."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in companded.named_parameters()}
    everything = dict(companded.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in companded.named_parameters()}
    of = lambda name: parameters[first[id(everything[name])]]  # noqa: E731
    weights = {}
    for name, _ in plain.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        site = f"{path}.parametrizations.{attribute}".lstrip(".")
        if f"{site}.original" in everything:
            weights[name] = psi(of(f"{site}.original"), of(f"{site}.0.a"), of(f"{site}.0.b"), kind)
        else:
            weights[name] = of(name)
    value = loss(functional_call(plain, weights, (data,), tie_weights=False))
    value.backward()
    return value.detach(), {name: p.grad for name, p in parameters.items()}


def square(output: Tensor) -> Tensor:
    return (
        (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device).view_as(output))
        .sum()
        .square()
    )


def gradients(model: nn.Module, data: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    square(model(data)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Relative to each gradient, or to a thousandth of the largest: before batch norm those by a and b cancel to 0."""
    assert actual.keys() == expected.keys()
    noise = 1e-3 * tolerance * max(gradient.norm().item() for gradient in expected.values())
    for name in actual:
        assert relative_error(actual[name], expected[name], noise) <= tolerance, name


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each call of the fused pass computes."""
    sizes: list[int] = []
    fused = _companded_weight.weight_companders

    def counting(vs: Any, a: Any, b: Any, kind: str) -> list[Tensor]:
        sizes.append(len(vs))
        return fused(vs, a, b, kind)

    monkeypatch.setattr(_companded_weight, "weight_companders", counting)
    return sizes


# ---- what is computed ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", CASES)
def test_the_function_stays(device: torch.device, name: str, per: str, kind: str) -> None:
    """v carries a rounding of half an ulp, as w does, which Psi does not magnify; layers add some up."""
    model, data = make(name, device)
    before = model(data)
    weights = {weight: model.get_parameter(weight).detach().clone() for weight in CASES[name].weights}
    companding = pyreg.compand(model, per=per, **reach(model, kind))
    assert set(companding.weights) == set(CASES[name].weights)
    assert relative_error(model(data), before) <= 32 * ROUNDOFF[torch.float32]
    for weight, w in weights.items():
        path, _, attribute = weight.rpartition(".")
        assert relative_error(getattr(model.get_submodule(path), attribute), w) <= 2 * ROUNDOFF[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", CASES)
def test_gradients(device: torch.device, name: str, per: str, kind: str) -> None:
    model, data = make(name, device, torch.float64)
    plain = copy.deepcopy(model)
    pyreg.compand(model, per=per, **reach(model, kind))
    actual = gradients(model, data)
    _, expected = plain_gradients(plain, model, data, kind, square)
    constants = [n for n in expected if n.endswith((".0.a", ".0.b"))]
    assert len(constants) == (2 if per == "model" else 2 * len(CASES[name].weights))
    assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize("name", CASES)
def test_one_pass_computes_all_weights(device: torch.device, name: str, passes: list[int]) -> None:
    model, data = make(name, device)
    pyreg.compand(model, **reach(model))
    passes.clear()
    model(data).sum().backward()
    assert passes == [len(CASES[name].weights)]
    with torch.no_grad():
        model(data)
    assert passes == [len(CASES[name].weights)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_parametrization_layer_by_layer(device: torch.device, kind: str) -> None:
    model, data = make("resnet", device)
    twin = copy.deepcopy(model)
    pyreg.compand(model, per="layer", **reach(model, kind))
    for weight in CASES["resnet"].weights:
        layer = twin.get_submodule(weight.removesuffix(".weight"))
        parametrize.register_parametrization(layer, "weight", WeightCompander(**reach(model, kind)))
    losses = []
    for network in (model, twin):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = (network(data) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    expected = dict(twin.named_parameters())
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, expected[name], rtol=1e-4, atol=1e-6)


def test_a_layer_that_takes_no_part_gets_no_gradient(device: torch.device) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}).to(device)
    model.forward = lambda x: model["used"](x)
    pyreg.compand(model)
    model(torch.randn(4, 3, device=device)).sum().backward()
    for name, param in model.named_parameters():
        assert (param.grad is None) == name.startswith("unused"), name


def test_frozen_weights_stay_frozen(device: torch.device, passes: list[int]) -> None:
    model, data = make("resnet", device)
    model.stem.requires_grad_(False)
    model.conv1.requires_grad_(False)
    companding = pyreg.compand(model, **reach(model))
    assert not companding.weights["stem.weight"].requires_grad
    assert not list(model.stem.parametrizations.weight[0].parameters())
    assert {name for name, _ in model.stem.parametrizations.weight[0].named_buffers()} == {"a", "b"}
    seen = []
    model.conv1.register_forward_hook(lambda layer, args, output: seen.append(layer.weight.requires_grad))
    model(data).sum().backward()
    assert seen == [False]
    assert passes == [3, 2]
    assert model.stem.parametrizations.weight.original.grad is None
    assert model.conv2.parametrizations.weight.original.grad is not None


def test_second_order(device: torch.device) -> None:
    """The gradient of a gradient penalty, by v, a and b."""
    model, data = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(device, torch.float64),
        torch.randn(5, 3),
    )
    data = data.to(device, torch.float64).requires_grad_()
    plain = copy.deepcopy(model)
    pyreg.compand(model, **reach(model))

    def penalty(output: Tensor) -> Tensor:
        return torch.autograd.grad(output.sum(), data, create_graph=True)[0].square().sum()

    penalty(model(data)).backward()
    _, expected = plain_gradients(plain, model, data, "arctan", penalty)
    for name, param in model.named_parameters():
        if expected[name] is not None:  # the last bias has no part in it
            assert relative_error(param.grad, expected[name]) <= 1e-11, name


# ---- which weights ----


def names(model: nn.Module, **options: Any) -> set[str]:
    return set(pyreg.compand(model, **options).weights)


def test_exclude(device: torch.device) -> None:
    everything = set(CASES["resnet"].weights)
    resnet = lambda: make("resnet", device)[0]  # noqa: E731
    assert names(resnet(), exclude="head") == everything - {"head.weight"}
    assert names(resnet(), exclude="head.weight") == everything - {"head.weight"}
    assert names(resnet(), exclude="conv*") == everything - {"conv1.weight", "conv2.weight"}
    assert names(resnet(), exclude=["conv?.weight", "stem"]) == {"shortcut.weight", "head.weight"}
    assert names(resnet(), exclude=nn.Conv2d) == {"head.weight"}
    model = resnet()
    assert names(model, exclude=(model.conv1, model.head)) == everything - {"conv1.weight", "head.weight"}
    encoder = make("language_model", device)[0]
    assert names(encoder, exclude=(nn.MultiheadAttention, "head"), a=1.3) == {
        "encoder.linear1.weight",
        "encoder.linear2.weight",
    }
    assert isinstance(encoder.head.weight, nn.Parameter)


def test_embeddings_by_choice(device: torch.device) -> None:
    def model() -> nn.Module:
        embeddings = nn.ModuleDict({"one": nn.Embedding(5, 3), "bag": nn.EmbeddingBag(5, 3), "linear": nn.Linear(3, 2)})
        for layer in (embeddings["one"], embeddings["bag"]):
            nn.init.uniform_(layer.weight, -0.5, 0.5)
        return embeddings.to(device)

    assert names(model()) == {"linear.weight"}
    assert names(model(), embeddings=True) == {"linear.weight", "one.weight", "bag.weight"}


def test_constants(device: torch.device) -> None:
    for per, shapes in (
        ("layer", [[]] * 10),
        ("channel", [[4], [4], [6], [6], [6], [6], [6], [6], [3], [3]]),
        ("model", [[], []]),
    ):
        model = make("resnet", device)[0]
        companding = pyreg.compand(model, per=per, **reach(model))
        assert [list(constant.shape) for constant in companding.constants] == shapes
        assert {round(constant.flatten()[0].item(), 6) for constant in companding.constants} == {1.3, -0.7}
    model = make("resnet", device)[0]
    companding = pyreg.compand(model, learnable=False, **reach(model))
    assert companding.constants == []
    assert sum(name.endswith(".0.a") for name, _ in model.named_buffers()) == 5
    assert model.head.parametrizations.weight[0].extra_repr() == "kind='arctan', learnable=False"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_device_layout_and_identity_stay(device: torch.device, dtype: torch.dtype) -> None:
    model = make("resnet", device, dtype)[0].to(memory_format=torch.channels_last)
    layout = lambda param: [stride for size, stride in zip(param.shape, param.stride(), strict=True) if size > 1]  # noqa: E731
    before = {name: (param, layout(param), param.detach().clone()) for name, param in model.named_parameters()}
    companding = pyreg.compand(model, **reach(model))
    for name, v in companding.weights.items():
        assert v is before[name][0]
        assert (v.dtype, v.device.type, layout(v)) == (dtype, device.type, before[name][1])
    constant = torch.float64 if dtype == torch.float64 else torch.float32
    assert {c.dtype for c in companding.constants} == {constant}
    pyreg.decompand(model)
    for name, param in model.named_parameters():
        kept, strides, value = before[name]
        assert param is kept
        assert layout(param) == strides
        assert relative_error(param, value) <= 2 * ROUNDOFF[dtype]


def test_mixed_dtypes(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double()).to(device)
    model.forward = lambda x: model[1](model[0](x).double())
    plain = copy.deepcopy(model)
    plain.forward = lambda x: plain[1](plain[0](x).double())
    companding = pyreg.compand(model, per="model", **reach(model))
    assert [c.dtype for c in companding.constants] == [torch.float64] * 2
    data = torch.randn(5, 3, device=device)
    actual = gradients(model, data)
    _, expected = plain_gradients(plain, model, data, "arctan", square)
    assert_close(actual, expected, 32 * ROUNDOFF[torch.float32])


# ---- tied weights ----


def test_tied_weights_are_companded_once_and_stay_tied(device: torch.device, passes: list[int]) -> None:
    model, data = make("language_model", device)
    pyreg.compand(model, **reach(model))
    embedding, head = model.embedding.parametrizations.weight, model.head.parametrizations.weight
    assert embedding.original is head.original
    assert embedding[0] is head[0]
    read: list[Tensor] = []
    for layer in (model.embedding, model.head):
        layer.register_forward_hook(lambda layer, args, output: read.append(layer.weight))
    passes.clear()
    model(data)
    assert read[0] is read[1]
    assert passes == [5]
    model.head.weight = torch.full((11, 8), 0.25, device=device)
    torch.testing.assert_close(model.embedding.weight, torch.full((11, 8), 0.25, device=device))
    pyreg.decompand(model)
    assert model.embedding.weight is model.head.weight
    assert isinstance(model.head.weight, nn.Parameter)


def test_a_shared_module_is_companded_once(device: torch.device) -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer).to(device)
    data = torch.randn(4, 3, device=device)
    before = model(data)
    assert list(pyreg.compand(model).weights) == ["0.weight"]
    assert relative_error(model(data), before) <= 16 * ROUNDOFF[torch.float32]
    pyreg.decompand(model)
    assert isinstance(model[2].weight, nn.Parameter)


def test_a_tied_weight_is_left_out_under_any_name(device: torch.device) -> None:
    for exclude in ("embedding", "head.weight"):
        model = make("language_model", device)[0]
        assert "embedding.weight" not in names(model, exclude=exclude, **reach(model))
        assert model.embedding.weight is model.head.weight


# ---- back to plain ----


@pytest.mark.parametrize("name", CASES)
def test_decompand(device: torch.device, name: str) -> None:
    model, data = make(name, device)
    listed = [n for n, _ in model.named_parameters()]
    modules = {n: type(module) for n, module in model.named_modules()}
    companding = pyreg.compand(model, **reach(model))
    before, sources = model(data), companding.weights
    companding.remove()
    assert torch.equal(model(data), before)
    assert [n for n, _ in model.named_parameters()] == listed
    assert {n: type(module) for n, module in model.named_modules()} == modules
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called
    for n, v in sources.items():
        assert model.get_parameter(n) is v
    pyreg.compand(model, **reach(model))
    assert relative_error(model(data), before) <= 32 * ROUNDOFF[torch.float32]


def test_decompand_of_a_copy_leaves_the_original(device: torch.device) -> None:
    model, data = make("resnet", device)
    pyreg.compand(model, **reach(model))
    before = model(data)
    average = copy.deepcopy(model)
    pyreg.decompand(average)
    assert torch.equal(average(data), before)
    assert torch.equal(model(data), before)
    pyreg.decompand(model)
    assert torch.equal(model(data), before)


def test_companding_a_copy_leaves_the_original(device: torch.device) -> None:
    """torch gives a copy of a layer with a parametrized bias the very class of the layer."""
    model = nn.Sequential(nn.Linear(3, 2)).to(device)
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    data = torch.randn(4, 3, device=device)
    before = model(data)
    twin = copy.deepcopy(model)
    pyreg.compand(twin)
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model(data), before)
    assert relative_error(twin(data), before) <= 16 * ROUNDOFF[torch.float32]
    pyreg.decompand(twin)
    assert isinstance(twin[0].weight, nn.Parameter)
    assert parametrize.is_parametrized(twin[0], "bias")
    assert relative_error(twin(data), before) <= 16 * ROUNDOFF[torch.float32]


def test_decompand_of_a_part(device: torch.device) -> None:
    model, data = make("language_model", device)
    pyreg.compand(model, **reach(model))
    before = model(data)
    pyreg.decompand(model.encoder.self_attn)
    assert isinstance(model.encoder.self_attn.in_proj_weight, nn.Parameter)
    assert relative_error(model(data), before) <= 16 * ROUNDOFF[torch.float32]
    assert len(companded := pyreg.companding.Companding(model).weights) == 3, companded


def test_decompand_takes_what_was_registered_by_hand(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 2)).to(device)
    parametrize.register_parametrization(model[0], "weight", WeightCompander())
    before = model[0].weight
    pyreg.decompand(model)
    assert torch.equal(model[0].weight, before)


# ---- when the weights of the joint pass are good ----


def fresh(layer: nn.Module, attribute: str = "weight") -> Tensor:
    """The weight by the formula."""
    site = layer.parametrizations[attribute]
    return psi(site.original.double(), site[0].a.double(), site[0].b.double(), site[0].kind)


def test_reads_outside_of_the_forward_are_fresh(device: torch.device) -> None:
    model, data = make("resnet", device)
    pyreg.compand(model, **reach(model))
    model(data)
    model.head.parametrizations.weight.original.data.mul_(2)  # a change that autograd does not see
    assert relative_error(model.head.weight, fresh(model.head)) <= 4 * ROUNDOFF[torch.float32]
    model.head.parametrizations.weight[0].a.data.mul_(2)
    x = torch.randn(2, 6, device=device)
    expected = F.linear(x.double(), fresh(model.head), model.head.bias.double())
    assert relative_error(model.head(x), expected) <= 16 * ROUNDOFF[torch.float32]


def test_memory_is_not_held_after_the_forward(device: torch.device) -> None:
    model, data = make("resnet", device)
    pyreg.compand(model, **reach(model))
    model(data)
    for weight in CASES["resnet"].weights:
        assert model.get_submodule(weight.removesuffix(".weight")).parametrizations.weight[0].joint is None


def test_a_layer_called_alone_trains(device: torch.device) -> None:
    model, _ = make("resnet", device)
    pyreg.compand(model, **reach(model))
    model.head(torch.randn(2, 6, device=device)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "head.bias", "head.parametrizations.weight.original", "head.parametrizations.weight.0.a",
        "head.parametrizations.weight.0.b",
    ]  # fmt: skip


class Reading(nn.Module):
    """A model that does something with its layer in the midst of its forward."""

    def __init__(self, within: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.within = within
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.within(self.layer)
        return self.layer(x)


def reading(within: Callable[[nn.Module], Any], device: torch.device) -> Reading:
    model = Reading(within).to(device)
    pyreg.compand(model)
    return model


def test_gradients_switched_on_within(device: torch.device) -> None:
    def within(layer: nn.Module) -> Tensor:
        with torch.enable_grad():
            return layer.weight

    model = reading(within, device)
    with torch.no_grad():
        model(torch.randn(2, 3, device=device))
    assert model.seen.requires_grad
    model.seen.sum().backward()
    assert model.layer.parametrizations.weight.original.grad is not None


def test_gradients_switched_off_within(device: torch.device, passes: list[int]) -> None:
    def within(layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return layer(torch.ones(1, 3, device=device))

    model = reading(within, device)
    output = model(torch.randn(2, 3, device=device))
    assert not model.seen.requires_grad
    assert output.requires_grad
    assert passes == [1]


def test_inference_mode_switched_off_within(device: torch.device) -> None:
    x = torch.ones(1, 3, device=device, requires_grad=True)

    def within(layer: nn.Module) -> Tensor:
        layer.parametrizations.weight.original.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            (layer(x) ** 2).sum().backward()

    model = Reading(within).to(device)
    pyreg.compand(model, learnable=False)
    with torch.inference_mode():
        model(torch.randn(2, 3, device=device))
    assert x.grad is not None


def test_weights_changed_within(device: torch.device) -> None:
    def in_place(layer: nn.Module) -> None:
        with torch.no_grad():
            layer.parametrizations.weight.original.zero_()

    def constant(layer: nn.Module) -> None:
        with torch.no_grad():
            layer.parametrizations.weight[0].a.mul_(2)

    def assigned(layer: nn.Module) -> None:
        layer.weight = torch.zeros(3, 3, device=device)

    def replaced(layer: nn.Module) -> None:
        """A moving average of weights, as a momentum encoder keeps it."""
        for param in layer.parameters():
            param.data = param.data * 0.5 + 0.1

    def the_weight_itself(layer: nn.Module) -> None:
        with torch.no_grad():
            layer.weight.zero_()

    for within in (in_place, constant, assigned, replaced, the_weight_itself):
        model = reading(within, device)
        x = torch.randn(2, 3, device=device)
        output = model(x)
        expected = F.linear(x.double(), fresh(model.layer), model.layer.bias.double())
        assert relative_error(output, expected) <= 16 * ROUNDOFF[torch.float32], within


@pytest.mark.parametrize("learnable", [False, True])
def test_weights_frozen_and_released_within(device: torch.device, learnable: bool) -> None:
    """A generator's loss and a discriminator's in one forward; the truth is each layer by itself."""

    class Adversaries(nn.Module):
        def __init__(self, frozen_first: bool) -> None:
            super().__init__()
            self.generator, self.critic = nn.Linear(3, 3), nn.Linear(3, 3)
            self.frozen_first = frozen_first

        def forward(self, x: Tensor) -> Tensor:
            v = self.critic.parametrizations.weight.original
            fake = self.generator(x)
            v.requires_grad_(not self.frozen_first)
            first = self.critic(fake)
            v.requires_grad_(self.frozen_first)
            second = self.critic(fake.detach())
            v.requires_grad_(True)
            return first - 2 * second

    data = torch.randn(4, 3, device=device, dtype=torch.float64)
    for frozen_first in (False, True):
        model = Adversaries(frozen_first).to(device, torch.float64)
        pyreg.compand(model, learnable=learnable)
        alone = copy.deepcopy(model)
        _companded_weight.JointPass.remove_from(alone)
        for network in (model, alone):  # as the forward finds it where the other pass was frozen
            network.critic.parametrizations.weight.original.requires_grad_(frozen_first)
        assert_close(gradients(model, data), gradients(alone, data), 1e-12)


def test_a_copy_made_within(device: torch.device) -> None:
    """As of a target network that is made in the first forward."""
    model = reading(lambda layer: copy.deepcopy(layer), device)
    model(torch.randn(2, 3, device=device))
    with torch.no_grad():
        model.layer.parametrizations.weight.original.mul_(2)
    assert relative_error(model.seen.weight, fresh(model.seen)) <= 4 * ROUNDOFF[torch.float32]
    assert relative_error(fresh(model.seen), fresh(model.layer)) > 0.1


def test_other_parameters_within(device: torch.device) -> None:
    """torch.func.functional_call of a layer inside of the model's forward."""
    name = "parametrizations.weight.original"
    v = torch.zeros(3, 3, device=device, requires_grad=True)
    model = reading(lambda layer: functional_call(layer, {name: v}, (torch.ones(1, 3, device=device),)), device)
    model(torch.randn(2, 3, device=device))
    torch.testing.assert_close(model.seen[0], model.layer.bias)
    model.seen.sum().backward()
    assert v.grad.abs().min() > 0
    assert model.layer.parametrizations.weight.original.grad is None


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        x = self.layer(x).tanh()
        if depth:
            x = self(x, depth - 1)
        return self.layer(x)


def test_a_model_that_calls_itself(device: torch.device, passes: list[int]) -> None:
    model, data = Recursive().to(device, torch.float64), torch.randn(2, 3, device=device, dtype=torch.float64)
    plain = copy.deepcopy(model)
    pyreg.compand(model)
    passes.clear()
    actual = gradients(model, data)
    assert passes == [1]
    _, expected = plain_gradients(plain, model, data, "arctan", square)
    assert_close(actual, expected, 1e-11)
    assert model.layer.parametrizations.weight[0].joint is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_is_left_by_an_error(device: torch.device, error: type[BaseException]) -> None:
    """Hooks do not run after a KeyboardInterrupt, and a change through .data leaves no trace."""

    def within(layer: nn.Module) -> None:
        raise error

    model = reading(within, device)
    with pytest.raises(error):
        model(torch.randn(2, 3, device=device))
    model.layer.parametrizations.weight.original.data.zero_()
    assert not model.layer.weight.any()
    model.within = lambda layer: layer.weight
    model(torch.randn(2, 3, device=device))
    assert not model.seen.any()
    assert model.layer.parametrizations.weight[0].joint is None


def test_an_error_in_an_inner_call(device: torch.device, passes: list[int]) -> None:
    class Retrying(Recursive):
        def forward(self, x: Tensor, depth: int = 1) -> Tensor:
            if depth == 0:
                raise ValueError
            with pytest.raises(ValueError):
                self(x, depth - 1)
            return self.layer(x)

    model = Retrying().to(device)
    pyreg.compand(model)
    passes.clear()
    model(torch.randn(2, 3, device=device)).sum().backward()
    assert passes == [1]


def test_threads(device: torch.device) -> None:
    """One thread trains while another evaluates the same model: each has weights with, or without, a graph."""
    inside, go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def within(layer: nn.Module) -> None:
        if torch.is_grad_enabled():
            inside.set()
            assert go_on.wait(60)

    model = reading(within, device)
    x = torch.randn(2, 3, device=device)

    def train() -> None:
        try:
            model(x).sum().backward()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    assert inside.wait(60)
    with torch.no_grad():
        model(x)
    go_on.set()
    thread.join()
    assert not errors
    assert model.layer.parametrizations.weight.original.grad is not None


def test_replicas_of_data_parallel(device: torch.device, passes: list[int]) -> None:
    """A replica shares the hooks of the model it was made of; its parameters are its own, computed singly."""
    model, data = Recursive().to(device), torch.randn(2, 3, device=device)
    pyreg.compand(model)
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, param in module._parameters.items():
            setattr(replica, name, 2 * param.detach())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in twin.parameters():
            param.mul_(2)
    expected = twin(data)
    passes.clear()
    assert torch.equal(replicas[model](data), expected)
    assert passes == [1] * 8


# ---- checkpoints of activations ----


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.options = {"use_reentrant": use_reentrant}

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(layer(x).tanh()).tanh()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(self.block, layer, x, **self.options) if self.options else self.block(layer, x)
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("what", ["parts", "the model"])
def test_checkpoint(device: torch.device, use_reentrant: bool, what: str) -> None:
    model = Checkpointed(use_reentrant).to(device, torch.float64)
    pyreg.compand(model)
    data = torch.randn(3, 4, device=device, dtype=torch.float64).requires_grad_()
    options, model.options = model.options, {}
    expected = {name: grad.clone() for name, grad in gradients(model, data).items()}
    model.zero_grad()
    if what == "parts":
        model.options = options
        output = model(data)
    else:
        output = checkpoint(model, data, **options)
    square(output).backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected, 1e-13)


def test_checkpoint_of_a_change_between_forward_and_backward(device: torch.device) -> None:
    model = Checkpointed(use_reentrant=False).to(device)
    pyreg.compand(model)
    loss = checkpoint(model, torch.randn(3, 4, device=device), use_reentrant=False).sum()
    with torch.no_grad():
        model.layers[0].parametrizations.weight.original.mul_(2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        other = model(torch.randn(3, 4, device=device)).sum()
    with torch.no_grad():
        model.layers[0].parametrizations.weight.original.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    del loss


# ---- a citizen of torch ----


def test_functional_call(device: torch.device) -> None:
    model, data = make("resnet", device, torch.float64)
    plain = copy.deepcopy(model)
    pyreg.compand(model, **reach(model))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1.1)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    square(functional_call(model, parameters, (data,))).backward()
    _, expected = plain_gradients(plain, other, data, "arctan", square)
    assert_close({name: p.grad for name, p in parameters.items()}, expected, 1e-11)
    assert all(p.grad is None for p in model.parameters())


def test_functional_transforms(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(device, torch.float64)
    data = torch.randn(5, 3, device=device, dtype=torch.float64)
    pyreg.compand(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = lambda p, x: square(functional_call(model, p, (x,)))  # noqa: E731
    expected = gradients(model, data)
    assert_close(torch.func.grad(loss)(parameters, data), expected, 1e-12)
    # per sample, and over an ensemble of models
    rows = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, data)
    first = torch.func.grad(loss)(parameters, data[0])
    assert_close({name: grad[0] for name, grad in rows.items()}, first, 1e-12)
    stacked = {name: torch.stack([p, 1.5 * p]) for name, p in parameters.items()}
    outputs = torch.vmap(lambda p: functional_call(model, p, (data,)))(stacked)
    scaled = functional_call(model, {name: 1.5 * p for name, p in parameters.items()}, (data,))
    assert relative_error(outputs[1], scaled) <= 1e-14


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder(device: torch.device, training: bool) -> None:
    """In evaluation it takes a path of its own, which reads every weight and calls no layer."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).to(device).train(training)
    data = torch.randn(3, 5, 8, device=device)
    padding = torch.zeros(3, 5, dtype=torch.bool, device=device)
    padding[:, 4:] = True
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = model(data, src_key_padding_mask=padding)[:, :4]
            companded = copy.deepcopy(model)
            pyreg.compand(companded, **reach(model))
            after = companded(data, src_key_padding_mask=padding)[:, :4]
        assert relative_error(after, before) <= 64 * ROUNDOFF[torch.float32]


def test_autocast(device: torch.device) -> None:
    """Weights keep their dtype and are cast where they are used."""
    model, data = make("resnet", device)
    plain = copy.deepcopy(model)
    pyreg.compand(model, **reach(model))
    seen: list[torch.dtype] = []
    handle = model.head.register_forward_hook(lambda layer, _, output: seen.extend((layer.weight.dtype, output.dtype)))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = gradients(model, data)
        _, expected = plain_gradients(plain, model, data, "arctan", square)
    handle.remove()
    assert seen == [torch.float32, torch.bfloat16]
    assert {grad.dtype for grad in actual.values()} == {torch.float32}
    largest = max(grad.norm().item() for grad in expected.values())
    for name, grad in actual.items():  # a weight that differs by an ulp may be cast to another bfloat16
        assert (grad - expected[name]).norm() <= 8 * ROUNDOFF[torch.bfloat16] * (expected[name].norm() + 0.01 * largest)


@pytest.mark.parametrize(
    ("name", "learnable", "backend"),
    [
        *((name, learnable, "aot_eager") for name in CASES for learnable in (True, False)),
        pytest.param("resnet", True, "inductor", marks=pytest.mark.needs_compiler),
    ],
)
def test_compile_fullgraph(device: torch.device, name: str, learnable: bool, backend: str) -> None:
    torch._dynamo.reset()
    model, data = make(name, device)
    pyreg.compand(model, learnable=learnable, **reach(model))
    expected = {n: grad.clone() for n, grad in gradients(model, data).items()}
    output = model(data).detach()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        model.zero_grad()
        result = compiled(data)
        square(result).backward()
        assert relative_error(result, output) <= 64 * ROUNDOFF[torch.float32]
        for n, param in model.named_parameters():
            torch.testing.assert_close(
                param.grad, expected[n], rtol=1e-3, atol=1e-4 * expected[n].abs().max().item() + 1e-6
            )
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.1)
        assert relative_error(compiled(data), model(data)) <= 64 * ROUNDOFF[torch.float32]


def test_compile_with_breaks_and_parts(device: torch.device) -> None:
    """Weights computed in one graph are read in the next; a compiled part of an eager model computes its own."""
    torch._dynamo.reset()
    model, data = make("resnet", device)
    pyreg.compand(model, **reach(model))
    expected = {name: grad.clone() for name, grad in gradients(model, data).items()}
    broken = copy.deepcopy(model)
    broken.norm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    part = copy.deepcopy(model)
    part.conv2 = torch.compile(part.conv2, backend="aot_eager")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(broken, backend=counter)
    for network, call in ((broken, compiled), (part, part)):
        for _ in range(3):
            network.zero_grad()
            square(call(data)).backward()
            grads = {name.replace("_orig_mod.", ""): p.grad for name, p in network.named_parameters()}
            for name in expected:
                torch.testing.assert_close(
                    grads[name], expected[name], rtol=1e-3, atol=1e-4 * expected[name].abs().max().item()
                )
        with torch.no_grad():
            for param in network.parameters():
                param.data.mul_(1.5)
        assert relative_error(network.head.weight, fresh(network.head)) <= 4 * ROUNDOFF[torch.float32]
    assert 2 <= counter.frame_count <= 4


def test_export(device: torch.device) -> None:
    model, data = make("resnet", device)
    model.eval()
    pyreg.compand(model, **reach(model))
    exported = torch.export.export(model, (data,))
    assert relative_error(exported.module()(data), model(data)) <= 16 * ROUNDOFF[torch.float32]
    assert model.head.parametrizations.weight[0].joint is None


def test_distributed_data_parallel(device: torch.device, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, data = make("resnet", device)
        pyreg.compand(model, **reach(model))
        expected = {name: grad.clone() for name, grad in gradients(model, data).items()}
        for unused in (False, True):
            model.zero_grad()
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
            square(wrapped(data)).backward()
            assert_close({name: p.grad for name, p in model.named_parameters()}, expected, 1e-5)
    finally:
        # The group's thread drops what it holds of the last reduction, for which it needs the interpreter's lock. Who
        # destroys the group before that waits for the thread, and holds the lock.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# ---- copies and checkpoints of parameters ----


def test_deepcopy_is_independent(device: torch.device, passes: list[int]) -> None:
    model, data = make("language_model", device)
    pyreg.compand(model, **reach(model))
    before = model(data)
    twin = copy.deepcopy(model)
    assert twin.head.parametrizations.weight.original is twin.embedding.parametrizations.weight.original
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.5)
    passes.clear()
    assert torch.equal(twin(data), before)
    assert passes == [5]
    twin(data).sum().backward()
    assert all(param.grad is None for param in model.parameters())
    assert all(param.grad is not None for param in twin.parameters())


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("learnable", [True, False])
def test_state_dict(device: torch.device, per: str, learnable: bool) -> None:
    model, data = make("language_model", device)
    pyreg.compand(model, per=per, learnable=learnable, **reach(model))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(1.1)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    other = make("language_model", device)[0]
    pyreg.compand(other, a=0.9, per=per, learnable=learnable, clamp=True)
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(other(data), model(data))
    assert other.head.parametrizations.weight.original is other.embedding.parametrizations.weight.original
    with pytest.raises(RuntimeError, match=r"Missing key.*parametrizations\.in_proj_weight\.original"):
        other.load_state_dict(make("language_model", device)[0].state_dict())


def test_pickling_is_refused_and_weights_are_saved_after_decompanding(device: torch.device) -> None:
    model, data = make("resnet", device)
    pyreg.compand(model, **reach(model))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(model)
    before = model(data)
    pyreg.decompand(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(data), before)


def test_a_model_is_freed_without_the_garbage_collector(device: torch.device) -> None:
    import gc
    import weakref

    model, data = make("resnet", device)
    pyreg.compand(model, **reach(model))
    model(data).sum().backward()
    freed = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert freed() is None
    finally:
        gc.enable()


def test_weights_assigned_and_initialised(device: torch.device) -> None:
    model, _ = make("resnet", device)
    companding = pyreg.compand(model, **reach(model))
    v = companding.weights["head.weight"]
    target = torch.empty(3, 6, device=device).uniform_(-1, 1)
    model.head.weight = target
    assert model.head.parametrizations.weight.original is v
    assert relative_error(model.head.weight, target) <= 2 * ROUNDOFF[torch.float32]


# ---- bad input ----


def broken_range() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    nn.init.constant_(model[1].weight, -1.5)
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))


def companded() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    pyreg.compand(model[1])
    return model


def spectral() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))


def tied_to_spectral() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2))
    model[1].register_parameter("weight", model[0].weight)
    nn.utils.parametrizations.spectral_norm(model[1], "weight")
    return model


def weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.Linear(2, 2), nn.utils.weight_norm(nn.Linear(2, 2)))


def complex_weights() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))


def two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


def embedding(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2, **options))


BAD = {
    "a zero": (broken_range, {"a": 0.0}, ValueError, r"compand: expected a to be finite and other than 0, got 0\.0"),
    "b NaN": (broken_range, {"b": float("nan")}, ValueError, r"compand: expected b to be finite .* got nan"),
    "b infinite": (broken_range, {"b": torch.tensor([float("inf")])}, ValueError, "expected b to be finite .* got inf"),
    "a a string": (broken_range, {"a": "1"}, TypeError, "compand: expected a to be a number or a tensor, got str"),
    "a an integer tensor": (
        broken_range,
        {"a": torch.tensor(1)},
        TypeError,
        r"expected a to be floating.*torch\.int64",
    ),
    "a of wrong shape": (
        broken_range,
        {"a": torch.ones(3), "per": "channel"},
        ValueError,
        r"expected a to be a number or a tensor of one element, got shape \[3\]; with per='channel' every",
    ),
    "b a matrix": (broken_range, {"b": torch.ones(2, 2)}, ValueError, r"expected b to hold one value.*shape \[2, 2\]"),
    "out of range": (
        broken_range,
        {"a": 0.5},
        ValueError,
        r"compand: 1\.weight: .*\|w\| < \|a\| pi / 2 = 0\.785398.*\|w\| up to 1\.5; .*clamp=True",
    ),
    "out of range of erf": (broken_range, {"kind": "erf"}, ValueError, r"compand: 1\.weight: .*= 0\.5 .*up to 1\.5"),
    "unknown kind": (broken_range, {"kind": "tanh"}, ValueError, "expected kind to be one of 'arctan', .*, got 'tanh'"),
    "unknown per": (
        broken_range,
        {"per": "row"},
        ValueError,
        "expected per to be 'layer', 'channel' or 'model', got 'row'",
    ),
    "no weights": (
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)),
        {},
        ValueError,
        "a Sequential with none; embed",
    ),
    "nothing left": (
        broken_range,
        {"exclude": nn.Linear},
        ValueError,
        "got a Sequential with none that is not excluded",
    ),
    "twice": (companded, {}, ValueError, r"not companded, but 1\.weight is; call pyreg\.decompand\(model\) first, or"),
    "parametrized": (spectral, {}, ValueError, r"1\.weight to have no parametrization, got _SpectralNorm; remove it"),
    "tied to parametrized": (tied_to_spectral, {}, ValueError, r"parameter that it is tied to has one"),
    "computed": (weight_norm, {}, ValueError, r"expected 1\.weight to be a parameter, got one that is computed"),
    "lazy": (lazy, {}, ValueError, r"expected 1\.weight to be initialized, got a lazy parameter; call the model once"),
    "meta": (two_devices, {}, ValueError, r"expected 1\.weight to hold values, got a tensor on the meta device; init"),
    "complex": (complex_weights, {}, TypeError, r"1\.weight to be float64, float32, .* got torch\.complex64"),
    "two devices": (two_devices, {"per": "model"}, ValueError, "one device for per='model', got cpu and meta; use"),
    "sparse embedding": (embedding(sparse=True), {"embeddings": True}, ValueError, r"1\.weight .* got sparse=True"),
    "renormed embedding": (
        embedding(max_norm=1.0),
        {"embeddings": True},
        ValueError,
        r"1\.weight .* got max_norm=1\.0",
    ),
    "a name that fits none": (
        broken_range,
        {"exclude": ["0", "haed"]},
        ValueError,
        "exclude to name .* got 'haed', which",
    ),
    "another's module": (broken_range, {"exclude": nn.Linear(2, 2)}, ValueError, "got a Linear, which fits none"),
    "a number to exclude": (broken_range, {"exclude": 3}, TypeError, "expected exclude to hold names .* got 3"),
}


def snapshot(model: nn.Module) -> list[Any]:
    """All that companding may change."""
    tensors = [(name, id(t), t._version, None if nn.parameter.is_lazy(t) else t.data_ptr(), t.requires_grad)
               for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]  # fmt: skip
    modules = [(name, id(module), type(module), len(module._forward_hooks), len(module._forward_pre_hooks))
               for name, module in model.named_modules()]  # fmt: skip
    return [tensors, modules]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_the_model_as_it_was(case: str) -> None:
    make, options, error, message = BAD[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        pyreg.compand(model, **options)
    assert snapshot(model) == before


def test_an_error_on_the_way_is_undone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make("language_model", device)
    before, weights = model(data), {name: param.detach().clone() for name, param in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    register = parametrize.register_parametrization
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> nn.Module:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("out of memory")
        return register(*args, **kwargs)

    monkeypatch.setattr(parametrize, "register_parametrization", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        pyreg.compand(model, **reach(model))
    assert list(weights) == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(param, weights[name]) for name, param in model.named_parameters())
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert model.embedding.weight is model.head.weight
    assert torch.equal(model(data), before)


def test_what_cannot_be_decompanded(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(3, 2)).to(device)
    with pytest.raises(ValueError, match=r"decompand: expected a model with companded weights, got one without; call"):
        pyreg.decompand(model)
    with pytest.raises(TypeError, match=r"decompand: expected model to be a torch\.nn\.Module, got OrderedDict"):
        pyreg.decompand(model.state_dict())
    pyreg.compand(model)
    nn.utils.parametrizations.spectral_norm(model[0])
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"0\.weight to have no parametrization on top .* got _SpectralNorm; remove it"
    ):
        pyreg.decompand(model)
    assert snapshot(model) == before


def test_compand_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"compand: expected model to be a torch\.nn\.Module, got list"):
        pyreg.compand([nn.Linear(2, 2)])


def test_clamp(device: torch.device) -> None:
    model = broken_range().to(device)
    pyreg.compand(model, a=0.5, clamp=True)
    assert torch.isfinite(model[1].parametrizations.weight.original).all()
    torch.testing.assert_close(
        model[1].weight, torch.full((2, 2), -0.5 * torch.pi / 2, device=device), rtol=1e-3, atol=0
    )
    model[0].weight = torch.full((2, 3), 9.0, device=device)
    torch.testing.assert_close(
        model[0].weight, torch.full((2, 3), 0.5 * torch.pi / 2, device=device), rtol=1e-3, atol=0
    )


def test_an_empty_layer_is_left_out(device: torch.device) -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(3, 0), nn.Linear(3, 2)).to(device)
    assert names(model, per="channel") == {"1.weight"}


# ---- the parametrization of one weight ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [[], [1], [4]])
def test_weight_compander(device: torch.device, shape: list[int], kind: str) -> None:
    layer = nn.Linear(3, 4).to(device, torch.float64)
    w = layer.weight.detach().clone()
    a, b = (torch.empty(shape, dtype=torch.float64, device=device).uniform_(0.9, 1.1) for _ in range(2))
    parametrize.register_parametrization(layer, "weight", WeightCompander(a, -b, kind=kind))
    compander, v = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    assert {name for name, _ in compander.named_parameters()} == {"a", "b"}
    assert relative_error(layer.weight, w) <= 1e-14
    layer.weight.square().sum().backward()
    twins = [t.detach().clone().requires_grad_() for t in (v, compander.a, compander.b)]
    psi(*twins, kind).square().sum().backward()
    for ours, twin in zip((v, compander.a, compander.b), twins, strict=True):
        assert relative_error(ours.grad, twin.grad) <= 1e-12
    assert torch.equal(a, compander.a)
    assert a is not compander.a


def test_weight_compander_options(device: torch.device) -> None:
    compander = WeightCompander(0.5, 2, learnable=False, kind="erf", clamp=True).to(device)
    assert not list(compander.parameters())
    assert compander.state_dict().keys() == {"a", "b"}
    assert repr(compander) == "WeightCompander(kind='erf', learnable=False, clamp=True)"
    v = compander.right_inverse(torch.tensor([0.25, 7.0], device=device))
    torch.testing.assert_close(compander(v), torch.tensor([0.25, 0.5], device=device))
    with pytest.raises(
        ValueError, match=r"weight_compander_inverse: .*= 0\.5 .*up to 7; choose a larger a, or pass clamp"
    ):
        WeightCompander(0.5, 2, kind="erf").to(device).right_inverse(torch.tensor([0.25, 7.0], device=device))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"kind": "tanh"},
            ValueError,
            "WeightCompander: expected kind to be one of 'arctan', 'arsinh', 'erf', got 'tanh'",
        ),
        ({"a": 0}, ValueError, r"WeightCompander: expected a to be finite and other than 0, got 0\.0"),
        ({"b": torch.tensor([1.0, float("nan")])}, ValueError, "WeightCompander: expected b to be finite .* got nan"),
        ({"a": True}, TypeError, "WeightCompander: expected a to be a number or a tensor, got bool"),
        ({"a": torch.ones(2, 1)}, ValueError, r"expected a to hold one value or \[C\].*shape \[2, 1\]"),
        ({"a": torch.ones(0)}, ValueError, r"expected a to hold one value or \[C\].*shape \[0\]"),
    ],
)
def test_weight_compander_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WeightCompander(**options)
