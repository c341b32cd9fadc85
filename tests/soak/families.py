"""A small training for every family of operators, and how its operators are held against their definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyreg
from pyreg import functional
from pyreg.nn import LinearStableMaxCrossEntropyLoss, ProgressivePseudoLabels, SamplesLoss, StableMaxCrossEntropyLoss
from pyreg.ops.weight_compander import rescale_steps_, to_weight_gradients_
from pyreg.optim import CompandedOptimizer, OrthoGrad, orthogonalize_gradients_
from pyreg.reference import conr as conr_reference
from pyreg.reference import info_nce as info_nce_reference
from pyreg.reference import linear_stablemax as linear_reference
from pyreg.reference import monge_gap as monge_gap_reference
from pyreg.reference import orthograd as orthograd_reference
from pyreg.reference import partial_transport as partial_reference
from pyreg.reference import sinkhorn as sinkhorn_reference
from pyreg.reference import sinkhorn_divergence as divergence_reference
from pyreg.reference import stablemax as stablemax_reference
from pyreg.reference import supcon as supcon_reference
from pyreg.reference import weight_compander as compander_reference

ROWS, FEATURES, CLASSES = 32, 16, 10

# Where an iteration of an operator ends, in the L1 norm of the marginals: 17 roundoffs of float32, of which results and
# gradients are off by some. What the definition in float32 is off by, which ends elsewhere, does not count.
TOL, TRUE_TOL, PLAIN_TOL = 1e-6, 1e-12, 1e-5
ROUNDOFFS_OF_TOL = 256.0

Function = Callable[..., "Tensor | list[Tensor]"]


class Comparison(NamedTuple):
    """An operator and its definition, on operands of one moment."""

    fused: Function
    plain: Function
    operands: list[Tensor]  # float32, or integers; gradients are asked for by all that require one
    roundoffs: float = 4.0  # by which results may be off where plain PyTorch happens to be exact
    is_iterated: bool = False  # roundoffs are all they may be off by


class Training:
    """One network in training."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model: nn.Module = self.network()
        self.optimizers: list[torch.optim.Optimizer] = self.optimize()

    def network(self) -> nn.Module:
        return mlp(FEATURES, CLASSES)

    def optimize(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.model.parameters(), lr=1e-3)]

    def operands(self) -> list[Tensor]:
        """Of the operator: a new batch, gone through the network."""
        raise NotImplementedError

    def loss(self, *operands: Tensor) -> Tensor:
        raise NotImplementedError

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        raise NotImplementedError

    def backward(self) -> list[Tensor]:
        operands = self.operands()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.loss(*operands).backward()
        return operands

    def step(self) -> None:
        self.backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def labels(self, x: Tensor) -> Tensor:
        """A class that x tells, of one in ten anything: what is learned is never all there is."""
        teacher = torch.arange(FEATURES * CLASSES).remainder(7).float().view(FEATURES, CLASSES) - 3
        random = torch.randint(CLASSES, (len(x),), generator=self.generator)
        is_random = torch.rand(len(x), generator=self.generator) < 0.1
        return torch.where(is_random, random, (x @ teacher).argmax(1))


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 24), nn.Tanh(), nn.Linear(24, outputs))


class StableMax(Training):
    """Under OrthoGrad."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = StableMaxCrossEntropyLoss(weight=self.randn(CLASSES).abs() + 0.5, label_smoothing=0.1)

    def optimize(self) -> list[torch.optim.Optimizer]:
        return [OrthoGrad(self.model.parameters(), torch.optim.AdamW, lr=1e-3)]

    def operands(self) -> list[Tensor]:
        x = self.randn(ROWS, FEATURES)
        return [self.model(x), self.labels(x)]

    def loss(self, *operands: Tensor) -> Tensor:
        return self.criterion(*operands)

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        def plain(logits: Tensor, target: Tensor) -> Tensor:
            weight = self.criterion.weight.to(logits.dtype)
            return stablemax_reference.stablemax_cross_entropy(logits, target, weight, label_smoothing=0.1)

        yield Comparison(self.loss, plain, operands)
        self.backward()
        for param in self.model.parameters():
            assert param.grad is not None
            # The gradient less its part along the weight: off by a roundoff of the two.
            yield Comparison(
                self._projected, orthograd_reference.orthogonalize_gradient, [param.detach(), param.grad.clone()], 8.0
            )

    @staticmethod
    def _projected(weight: Tensor, grad: Tensor) -> Tensor:
        param = nn.Parameter(weight.clone())
        param.grad = grad.clone()
        orthogonalize_gradients_([param])
        return param.grad


class LinearStableMax(Training):
    def network(self) -> nn.Module:
        return nn.ModuleList([mlp(FEATURES, 12), LinearStableMaxCrossEntropyLoss(12, CLASSES, bias=True)])

    def operands(self) -> list[Tensor]:
        x, (body, head) = self.randn(ROWS, FEATURES), self.model
        return [body(x), head.linear.weight, head.linear.bias, self.labels(x)]

    def loss(self, *operands: Tensor) -> Tensor:
        hidden, _, _, target = operands
        return self.model[1](hidden, target)

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        def fused(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
            return functional.linear_stablemax_cross_entropy(hidden, weight, target, linear_bias=bias)

        def plain(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
            return linear_reference.linear_stablemax_cross_entropy(hidden, weight, target, bias)

        yield Comparison(fused, plain, operands)


class WeightCompander(Training):
    """With learned constants, under CompandedOptimizer and plain SGD."""

    DECAY = 1e-3

    def network(self) -> nn.Module:
        model = mlp(FEATURES, CLASSES)
        self.companding = pyreg.compand(model)
        return model

    def optimize(self) -> list[torch.optim.Optimizer]:
        others = [param for param in self.model.parameters() if all(param is not c for c in self.companding.constants)]
        return [
            CompandedOptimizer(others, self.model, torch.optim.Adam, lr=1e-3, decay=self.DECAY),
            torch.optim.SGD(self.companding.constants, lr=1e-3),
        ]

    def operands(self) -> list[Tensor]:
        x = self.randn(ROWS, FEATURES)
        return [self.model(x), self.labels(x)]

    def loss(self, *operands: Tensor) -> Tensor:
        return F.cross_entropy(*operands)

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        self.backward()
        for layer in (self.model[0], self.model[2]):
            weight = layer.parametrizations.weight
            constants = weight[0].a, weight[0].b
            yield Comparison(
                functional.weight_compander, compander_reference.weight_compander, [weight.original, *constants]
            )
            old, step = weight.original.detach(), 1e-3 * self.randn(*weight.original.shape)
            fixed = [constant.detach() for constant in constants]
            yield Comparison(self._by_w, self._plainly_by_w, [weight.original.grad.clone(), old, *fixed])
            yield Comparison(self._rescaled, self._plainly_rescaled, [old + step, old, *fixed])

    def _by_w(self, grad: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        grad = grad.clone()
        to_weight_gradients_([grad], [v], [a], [b], decay=self.DECAY)
        return grad

    def _plainly_by_w(self, grad: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        grad = grad.clone()
        compander_reference.to_weight_gradient_(grad, v, a, b, "arctan", decay=self.DECAY)
        return grad

    @staticmethod
    def _rescaled(v: Tensor, old: Tensor, a: Tensor, b: Tensor) -> Tensor:
        v = v.clone()
        rescale_steps_([v], [old], [a], [b])
        return v

    @staticmethod
    def _plainly_rescaled(v: Tensor, old: Tensor, a: Tensor, b: Tensor) -> Tensor:
        v = v.clone()
        compander_reference.rescale_step_(v, old, a, b, "arctan")
        return v


class ConR(Training):
    def network(self) -> nn.Module:
        return nn.ModuleList([mlp(FEATURES, 12), nn.Linear(12, 1)])

    def operands(self) -> list[Tensor]:
        x, (body, head) = self.randn(ROWS, FEATURES), self.model
        features = body(x)
        return [features, 4 * x[:, :1] + 0.3 * self.randn(ROWS, 1), head(features)]

    def loss(self, *operands: Tensor) -> Tensor:
        _, targets, preds = operands
        return F.l1_loss(preds, targets) + self._conr(*operands)

    @staticmethod
    def _conr(features: Tensor, targets: Tensor, preds: Tensor) -> Tensor:
        return functional.conr_loss(features, targets, preds, window=1.0, temperature=0.2)

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        features, targets, preds = operands[0], operands[1], operands[2].detach()

        def fused(z: Tensor) -> Tensor:
            return self._conr(z, targets, preds)

        def plain(z: Tensor) -> Tensor:
            # Which pairs are near is a matter of the float32 labels, here and there.
            return conr_reference.conr_loss(z, targets, preds, window=1.0, temperature=0.2)

        yield Comparison(fused, plain, [features], 8.0)


class InfoNCE(Training):
    def network(self) -> nn.Module:
        return nn.ModuleList([mlp(FEATURES, 12), mlp(FEATURES, 12)])

    def operands(self) -> list[Tensor]:
        x = self.randn(ROWS, FEATURES)
        return [encoder(x + 0.3 * self.randn(ROWS, FEATURES)) for encoder in self.model]

    def loss(self, *operands: Tensor) -> Tensor:
        return functional.info_nce(*operands, temperature=0.2, symmetric=True)

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        def plain(query: Tensor, key: Tensor) -> Tensor:
            return info_nce_reference.info_nce(query, key, temperature=0.2, symmetric=True)

        yield Comparison(self.loss, plain, operands, 8.0)


class SupCon(Training):
    def operands(self) -> list[Tensor]:
        x = self.randn(ROWS, FEATURES)
        return [self.model(x), self.labels(x)]

    def loss(self, *operands: Tensor) -> Tensor:
        return functional.supcon_loss(*operands, temperature=0.2)

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        def plain(features: Tensor, labels: Tensor) -> Tensor:
            return supcon_reference.supcon_loss(features, labels, temperature=0.2)

        yield Comparison(self.loss, plain, operands, 8.0)


class Sinkhorn(Training):
    """Of a learned cost, whose plan is to be the one of a true cost."""

    EPSILON = 0.5

    def operands(self) -> list[Tensor]:
        x = self.randn(ROWS, FEATURES)
        target = F.one_hot(self.labels(x), CLASSES) + 1 / CLASSES
        return [1 + 3 * self.model(x).sigmoid(), target / target.sum()]  # the value stays above 0

    def loss(self, *operands: Tensor) -> Tensor:
        cost, target = operands
        value, plan = self._transport(cost)
        return F.mse_loss(ROWS * plan, ROWS * target) + 0.1 * value

    def _transport(self, cost: Tensor) -> list[Tensor]:
        transport = functional.sinkhorn(cost, epsilon=self.EPSILON, tol=TOL)
        return [transport.value, transport.plan()]

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        def plain(cost: Tensor) -> list[Tensor]:
            a, b = (cost.new_full((size,), 1 / size) for size in cost.shape)
            tol = TRUE_TOL if cost.dtype == torch.float64 else PLAIN_TOL
            f, g = sinkhorn_reference.sinkhorn(cost, a, b, self.EPSILON, tol=tol)
            value = sinkhorn_reference.value(cost, a, b, f, g, self.EPSILON)
            return [value, sinkhorn_reference.plan(cost, a, b, f, g, self.EPSILON)]

        yield Comparison(self._transport, plain, operands[:1], ROUNDOFFS_OF_TOL, is_iterated=True)


class _Generator(Training):
    """Points that are to be distributed like others."""

    def network(self) -> nn.Module:
        return mlp(2, 2)

    def operands(self) -> list[Tensor]:
        return [self.model(self.randn(ROWS, 2)), self.randn(ROWS + 5, 2) * torch.tensor([0.3, 1.5]) + 1]


class SinkhornDivergence(_Generator):
    """And the transport itself."""

    EPSILON = 1.0

    def loss(self, *operands: Tensor) -> Tensor:
        return self._divergence(*operands) + 0.1 * self._transported(*operands)[0]

    def _divergence(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.sinkhorn_divergence(x, y, epsilon=self.EPSILON, tol=TOL)

    def _transported(self, x: Tensor, y: Tensor) -> list[Tensor]:
        transport = functional.sinkhorn_points(x, y, epsilon=self.EPSILON, tol=TOL)
        return [transport.value, transport.map(x)]

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        cost = sinkhorn_reference.pairwise_cost

        def weights(x: Tensor, y: Tensor) -> list[Tensor]:
            return [points.new_full((len(points),), 1 / len(points)) for points in (x, y)]

        def divergence(x: Tensor, y: Tensor) -> Tensor:
            tol = TRUE_TOL if x.dtype == torch.float64 else PLAIN_TOL
            return divergence_reference.sinkhorn_divergence(
                x, y, *weights(x, y), lambda one, other: cost(one, other, "sqeuclidean"), self.EPSILON, tol=tol
            )

        def transported(x: Tensor, y: Tensor) -> list[Tensor]:
            costs, (a, b) = cost(x, y, "sqeuclidean"), weights(x, y)
            tol = TRUE_TOL if x.dtype == torch.float64 else PLAIN_TOL
            f, g = sinkhorn_reference.sinkhorn(costs, a, b, self.EPSILON, tol=tol)
            plan = sinkhorn_reference.plan(costs, a, b, f, g, self.EPSILON)
            return [sinkhorn_reference.value(costs, a, b, f, g, self.EPSILON), plan @ y / plan.sum(1, keepdim=True)]

        yield Comparison(self._divergence, divergence, operands, ROUNDOFFS_OF_TOL, is_iterated=True)
        yield Comparison(self._transported, transported, operands, ROUNDOFFS_OF_TOL, is_iterated=True)


class SamplesLosses(_Generator):
    """geomloss's, of a fixed number of iterations."""

    BLUR, DIAMETER, SCALING = 0.3, 8.0, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.criterion = SamplesLoss(p=2, blur=self.BLUR, diameter=self.DIAMETER, scaling=self.SCALING)

    def loss(self, *operands: Tensor) -> Tensor:
        return self.criterion(*operands)

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        steps = divergence_reference.epsilons(2, self.DIAMETER, self.BLUR, self.SCALING)

        def plain(x: Tensor, y: Tensor) -> Tensor:
            x, y = x.unsqueeze(0), y.unsqueeze(0)
            a, b = (points.new_full(points.shape[:2], 1 / points.shape[1]) for points in (x, y))
            return divergence_reference.samples_loss(x, y, a, b, 2, steps).squeeze(0)

        yield Comparison(self.loss, plain, operands, 16.0)


class MongeGap(Training):
    EPSILON = 2.0

    def network(self) -> nn.Module:
        return mlp(2, 2)

    def operands(self) -> list[Tensor]:
        x = self.randn(ROWS, 2)
        return [x, self.model(x)]

    def loss(self, *operands: Tensor) -> Tensor:
        x, mapped = operands
        return F.mse_loss(mapped, x.flip(1) + 1) + self._gap(x, mapped)

    def _gap(self, x: Tensor, mapped: Tensor) -> Tensor:
        return functional.monge_gap(x, mapped, epsilon=self.EPSILON, tol=TOL)

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        def plain(x: Tensor, mapped: Tensor) -> Tensor:
            tol = TRUE_TOL if x.dtype == torch.float64 else PLAIN_TOL
            return monge_gap_reference.monge_gap(x, mapped, self.EPSILON, tol=tol)

        yield Comparison(self._gap, plain, operands, ROUNDOFFS_OF_TOL, is_iterated=True)


class PartialTransport(Training):
    """Pseudo-labels with a memory bank, of the semantic form."""

    def network(self) -> nn.Module:
        return nn.ModuleList([mlp(FEATURES, 12), nn.Linear(12, CLASSES)])

    def optimize(self) -> list[torch.optim.Optimizer]:
        self.labelling = ProgressivePseudoLabels(
            CLASSES, ramp_steps=1000, semantic_weight=0.5, bank_size=48, feature_dim=12, mm_iter=2, tol=TOL
        )
        return super().optimize()

    def operands(self) -> list[Tensor]:
        body, head = self.model
        features = F.normalize(body(self.randn(ROWS, FEATURES)), dim=1)
        return [4 * head(features), features]

    def loss(self, *operands: Tensor) -> Tensor:
        logits, features = operands
        labels = self.labelling(logits, features)
        return -(labels * logits.log_softmax(1)).sum() / labels.sum()

    def comparisons(self, operands: list[Tensor]) -> Iterable[Comparison]:
        mass = self.labelling.mass
        weights = {"mass": mass, "semantic_weight": 0.5 * (1 - mass), "mm_iter": 2, "mm_tol": 0.0}

        def fused(logits: Tensor, features: Tensor) -> Tensor:
            return functional.semantic_partial_transport(logits, features=features, tol=TOL, **weights)

        def plain(logits: Tensor, features: Tensor) -> Tensor:
            tol = TRUE_TOL if logits.dtype == torch.float64 else PLAIN_TOL
            return partial_reference.semantic_partial_transport(
                logits, features @ features.t(), tol=tol, max_iter=2000, **weights
            )

        constants = [operand.detach() for operand in operands]
        yield Comparison(fused, plain, constants, ROUNDOFFS_OF_TOL, is_iterated=True)


FAMILIES: dict[str, type[Training]] = {
    "stablemax": StableMax,
    "linear_stablemax": LinearStableMax,
    "weight_compander": WeightCompander,
    "conr": ConR,
    "info_nce": InfoNCE,
    "supcon": SupCon,
    "sinkhorn": Sinkhorn,
    "sinkhorn_divergence": SinkhornDivergence,
    "samples_loss": SamplesLosses,
    "monge_gap": MongeGap,
    "partial_transport": PartialTransport,
}
