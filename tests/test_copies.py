"""Networks in training that are copied, pickled, saved and loaded, with their losses and optimizers: every copy goes on
with the bits of the original."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyreg
from pyreg.functional import sinkhorn, sinkhorn_points
from pyreg.nn import (
    ConRLoss,
    InfoNCELoss,
    LinearStableMaxCrossEntropyLoss,
    MongeGap,
    ProgressivePseudoLabels,
    SamplesLoss,
    StableMaxCrossEntropyLoss,
    SupConLoss,
)
from pyreg.optim import CompandedOptimizer, OrthoGrad

ROWS, FEATURES, CLASSES = 20, 6, 5

pytestmark = [pytest.mark.not_emulated, pytest.mark.usefixtures("one_thread")]


class Network(nn.Module):
    """A layer and a loss of its outputs, which ``call`` names."""

    def __init__(self, call: Callable[..., Tensor], head: nn.Module, outputs: int = CLASSES) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(FEATURES, outputs), nn.Linear(FEATURES, outputs)
        self.call, self.head = call, head

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


# Functions of the module, which pickle finds by their names.


def of_labels(network: Network, x: Tensor) -> Tensor:
    return network.head(network.layer(x), torch.arange(len(x), device=x.device) % CLASSES)


def of_two(network: Network, x: Tensor) -> Tensor:
    return network.head(network.layer(x), network.other(x))


def of_targets(network: Network, x: Tensor) -> Tensor:
    return network.head(network.layer(x), 3 * x[:, 0], network.other(x)[:, 0])


def of_pseudo_labels(network: Network, x: Tensor) -> Tensor:
    logits, features = network.layer(x), nn.functional.normalize(network.other(x), dim=1)
    return -(network.head(logits, features) * logits.log_softmax(1)).sum()


def of_layers(network: Network, x: Tensor) -> Tensor:
    return network.head(network.layer(x).tanh() + network.other(x)).square().sum()


def companded(**options: Any) -> Network:
    network = Network(of_layers, nn.Linear(CLASSES, 2))
    pyreg.compand(network, **options)
    return network


NETWORKS: dict[str, Callable[[], Network]] = {
    "StableMaxCrossEntropyLoss": lambda: Network(
        of_labels, StableMaxCrossEntropyLoss(weight=torch.linspace(1, 2, CLASSES), label_smoothing=0.1)
    ),
    "LinearStableMaxCrossEntropyLoss": lambda: Network(of_labels, LinearStableMaxCrossEntropyLoss(CLASSES, 7)),
    "ConRLoss": lambda: Network(of_targets, ConRLoss(temperature=0.2)),
    "InfoNCELoss": lambda: Network(of_two, InfoNCELoss(symmetric=True)),
    "SupConLoss": lambda: Network(of_labels, SupConLoss()),
    "SamplesLoss": lambda: Network(of_two, SamplesLoss(blur=0.3)),
    "MongeGap": lambda: Network(of_two, MongeGap(epsilon=0.5)),
    "ProgressivePseudoLabels": lambda: Network(
        of_pseudo_labels,
        ProgressivePseudoLabels(
            CLASSES,
            ramp_steps=4,
            semantic_weight=0.5,
            bank_size=32,
            feature_dim=CLASSES,
            prior=torch.linspace(0.1, 0.3, CLASSES),
        ),
    ),
    "compand": companded,
    "compand, fixed": lambda: companded(learnable=False, kind="erf", a=2.0),
}
COMPANDED = frozenset(name for name in NETWORKS if name.startswith("compand"))

Pair = tuple[Network, torch.optim.Optimizer]


def make(name: str, device: torch.device | str) -> Pair:
    torch.manual_seed(0)
    network = NETWORKS[name]().to(device)
    if name in COMPANDED:
        return network, CompandedOptimizer(network.parameters(), network, torch.optim.Adam, lr=1e-2, decay=1e-3)
    return network, OrthoGrad(network.parameters(), torch.optim.AdamW, lr=1e-2)


def train(pair: Pair, first: int = 0, steps: int = 3) -> list[float]:
    """Losses of steps whose batches follow from their numbers."""
    network, optimizer = pair
    device, losses = next(network.parameters()).device, []
    for step in range(first, first + steps):
        x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(step)).to(device)
        optimizer.zero_grad()
        loss = network(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def through_a_file(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def states(pair: Pair) -> dict[str, Any]:
    return {"network": pair[0].state_dict(), "optimizer": pair[1].state_dict()}


def restored(name: str, saved: dict[str, Any], device: torch.device | str) -> Pair:
    """A new network and a new optimizer, trained in another way, that take over what was saved."""
    pair = make(name, device)
    train(pair, first=50, steps=1)
    pair[0].load_state_dict(saved["network"])
    pair[1].load_state_dict(saved["optimizer"])
    return pair


COPIES: dict[str, Callable[[str, Pair], Pair]] = {
    "deepcopy": lambda name, pair: copy.deepcopy(pair),
    "pickle": lambda name, pair: pickle.loads(pickle.dumps(pair)),
    "file": lambda name, pair: through_a_file(pair, weights_only=False),
    "state dict": lambda name, pair: restored(
        name, through_a_file(states(pair), weights_only=True), next(pair[0].parameters()).device
    ),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_goes_on_as_the_original(device: torch.device, name: str, way: str) -> None:
    original = make(name, device)
    train(original)
    if name in COMPANDED and way in ("pickle", "file"):
        with pytest.raises(RuntimeError, match="state_dict"):  # as of every parametrized module
            COPIES[way](name, original)
        return
    twin = COPIES[way](name, original)
    assert repr(twin[0]) == repr(original[0])
    before = [param.detach().clone() for param in original[0].parameters()]
    losses = train(twin, first=3)
    assert all(torch.equal(param, old) for param, old in zip(original[0].parameters(), before, strict=True))
    assert train(original, first=3) == losses
    for one, other in zip(twin[0].parameters(), original[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["StableMaxCrossEntropyLoss", "compand"])
def test_a_copied_optimizer_shares_nothing(device: torch.device, name: str) -> None:
    """One that is copied alone takes copies of its parameters along, and those of its model."""
    pair = make(name, device)
    train(pair)
    twin = copy.deepcopy(pair[1])

    def tensors(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
        kept = [value for state in optimizer.state.values() for value in state.values()]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        return {tensor.data_ptr(): tensor for tensor in (*params, *kept) if isinstance(tensor, Tensor)}

    assert len(tensors(twin)) == len(tensors(pair[1])) > 8
    assert not tensors(twin).keys() & tensors(pair[1]).keys()
    assert len(twin.state) == len(pair[1].state) >= 2
    assert twin.state.keys() <= {param for group in twin.param_groups for param in group["params"]}
    if name == "compand":
        assert isinstance(twin, CompandedOptimizer)
        params = [param for group in twin.param_groups for param in group["params"]]
        assert all(one is other for one, other in zip(twin.model.parameters(), params, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_state_dicts_across_devices(device: torch.device, name: str) -> None:
    """There and back, and into a network that had no values."""
    original = make(name, device)
    train(original)
    saved = states(original)
    on_cpu = restored(name, through_a_file(saved, weights_only=True, map_location="cpu"), "cpu")
    assert {tensor.device.type for tensor in on_cpu[0].state_dict().values() if isinstance(tensor, Tensor)} == {"cpu"}
    back = restored(name, through_a_file(states(on_cpu), weights_only=True, map_location=device), device)
    expected = train(original, first=3)
    assert train(back, first=3) == expected
    # Products of another device, in float32, in some steps of Adam.
    assert train(on_cpu, first=3) == pytest.approx(expected, rel=1e-3)

    if name not in COMPANDED:  # compand inverts values
        empty = NETWORKS[name]().to("meta")
        empty.load_state_dict(copy.deepcopy(original[0].state_dict()), assign=True)
        x = torch.randn(ROWS, FEATURES, device=device)
        assert torch.equal(empty(x), original[0](x))


def test_results_of_transport() -> None:
    x, y = torch.randn(8, 2), torch.randn(9, 2)
    for transport in (sinkhorn(torch.rand(8, 9), epsilon=0.3), sinkhorn_points(x, y, epsilon=0.5)):
        for twin in (copy.deepcopy(transport), pickle.loads(pickle.dumps(transport))):
            assert repr(twin) == repr(transport)
            for one in ("value", "f", "g", "n_iter", "marginal_error"):
                assert torch.equal(getattr(twin, one), getattr(transport, one))
            assert torch.equal(twin.plan(), transport.plan())
            assert torch.equal(twin.apply(y), transport.apply(y))


def test_representations() -> None:
    shown = repr(StableMaxCrossEntropyLoss(weight=torch.ones(3), label_smoothing=0.1))
    assert shown == ("StableMaxCrossEntropyLoss(reduction='mean', ignore_index=-100, label_smoothing=0.1, weight=[3])")
    shown = repr(LinearStableMaxCrossEntropyLoss(3, 4, reduction="sum"))
    assert "reduction='sum', ignore_index=-100, label_smoothing=0.0\n" in shown
