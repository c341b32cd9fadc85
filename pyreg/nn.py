"""Operators as modules, named as in :mod:`torch.nn`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyreg import functional
from pyreg.ops import samples_loss
from pyreg.ops._checks import check_flag, check_number
from pyreg.ops._library import accumulate_dtype
from pyreg.ops._options import CostName, Kind, Reduction, Variant
from pyreg.ops.partial_transport import check_mass
from pyreg.ops.weight_compander import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch.distributed as dist

__all__ = [
    "ConRLoss",
    "InfoNCELoss",
    "LinearStableMaxCrossEntropyLoss",
    "MongeGap",
    "ProgressivePseudoLabels",
    "SamplesLoss",
    "StableMaxCrossEntropyLoss",
    "SupConLoss",
    "WeightCompander",
]


# To type checkers a call of ``torch.nn.Module`` takes and returns anything. Modules here are called as their forward
# is.


class StableMaxCrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross-entropy under StableMax, in place of :class:`torch.nn.CrossEntropyLoss`, whose constructor it has.

    Formula, shapes, dtypes, errors and gradients: :func:`pyreg.functional.stablemax_cross_entropy`.

    Args:
        weight, ignore_index, reduction, label_smoothing: as in :class:`torch.nn.CrossEntropyLoss`.
        group, num_classes: of classes that are divided among ranks.

    Example:
        >>> loss = pyreg.nn.StableMaxCrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.randn(8, 113, requires_grad=True), torch.randint(113, (8,))).backward()
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        group: dist.ProcessGroup | bool | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.group, self.num_classes = group, num_classes

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.stablemax_cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            group=self.group,
            num_classes=self.num_classes,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return _cross_entropy_repr(self) + _group_repr(self.group)


class LinearStableMaxCrossEntropyLoss(torch.nn.Module):
    """A linear layer and its StableMax cross-entropy in one: the head of a language model without its logits. In place
    of :class:`torch.nn.LinearCrossEntropyLoss`, whose constructor it has.

    The layer is the attribute ``linear``; tie it to an embedding by ``loss.linear.weight = embedding.weight``, and take
    logits where they are wanted, as in generation, by ``loss.linear(hidden)``.

    Formula, shapes, dtypes, errors and gradients: :func:`pyreg.functional.linear_stablemax_cross_entropy`.

    Args:
        in_features: features ``H`` of the input ``[..., H]``.
        num_classes: classes ``C``.
        bias: whether the layer has one.
        device, dtype: of the layer.
        weight: class weights ``[C]``.
        reduction, ignore_index, label_smoothing: as in :class:`torch.nn.CrossEntropyLoss`.

    Example:
        >>> head = pyreg.nn.LinearStableMaxCrossEntropyLoss(64, 8000)
        >>> head(torch.randn(2, 128, 64), torch.randint(8000, (2, 128))).backward()
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.linear_stablemax_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return _cross_entropy_repr(self)


def _cross_entropy_repr(loss: StableMaxCrossEntropyLoss | LinearStableMaxCrossEntropyLoss) -> str:
    return f"reduction={loss.reduction!r}, ignore_index={loss.ignore_index}, label_smoothing={loss.label_smoothing}" + (
        "" if loss.weight is None else f", weight=[{loss.weight.shape[0]}]"
    )


class ConRLoss(torch.nn.Module):
    """ConR, the contrastive regularizer for deep imbalanced regression, to be added to a regression loss.

    Formula, arguments, shapes, dtypes, errors and gradients: :func:`pyreg.functional.conr_loss`.

    Example:
        >>> conr = pyreg.nn.ConRLoss(window=1.0, temperature=0.07)
        >>> encoder, head = torch.nn.Linear(8, 32), torch.nn.Linear(32, 1)
        >>> x, ages = torch.randn(64, 8), torch.randint(100, (64, 1)).float()
        >>> features = encoder(x)
        >>> preds = head(features)
        >>> (torch.nn.functional.l1_loss(preds, ages) + conr(features, ages, preds)).backward()
    """

    def __init__(
        self,
        *,
        window: float = 1.0,
        temperature: float = 0.07,
        eta: float = 0.01,
        variant: Variant = "paper",
        label_norm: float = 2,
        reduction: Reduction = "mean",
        group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__()
        self.window, self.temperature, self.eta = window, temperature, eta
        self.variant, self.label_norm, self.reduction, self.group = variant, label_norm, reduction, group

    def forward(self, features: Tensor, targets: Tensor, preds: Tensor, weights: Tensor | None = None) -> Tensor:
        return functional.conr_loss(
            features,
            targets,
            preds,
            window=self.window,
            temperature=self.temperature,
            eta=self.eta,
            weights=weights,
            variant=self.variant,
            label_norm=self.label_norm,
            reduction=self.reduction,
            group=self.group,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return (
            f"window={self.window}, temperature={self.temperature}, eta={self.eta}, variant={self.variant!r}, "
            f"label_norm={self.label_norm}, reduction={self.reduction!r}" + _group_repr(self.group)
        )


class SupConLoss(torch.nn.Module):
    """The supervised contrastive loss: samples of the same label attract each other, all others repel.

    Formula, arguments, shapes, dtypes, errors and gradients: :func:`pyreg.functional.supcon_loss`.

    Example:
        >>> loss = pyreg.nn.SupConLoss(temperature=0.1)
        >>> loss(torch.randn(64, 128, requires_grad=True), torch.randint(10, (64,))).backward()
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.normalize, self.reduction, self.group = temperature, normalize, reduction, group

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return functional.supcon_loss(
            features,
            labels,
            temperature=self.temperature,
            normalize=self.normalize,
            reduction=self.reduction,
            group=self.group,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, normalize={self.normalize}, reduction={self.reduction!r}"
            + _group_repr(self.group)
        )


class InfoNCELoss(torch.nn.Module):
    """InfoNCE with in-batch negatives: query i is to find key i among all keys.

    Formula, arguments, shapes, dtypes, errors and gradients: :func:`pyreg.functional.info_nce`.

    Example:
        >>> clip = pyreg.nn.InfoNCELoss(temperature=0.07, symmetric=True)
        >>> clip(torch.randn(64, 128, requires_grad=True), torch.randn(64, 128)).backward()
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        normalize: bool = True,
        symmetric: bool = False,
        reduction: Reduction = "mean",
        group: dist.ProcessGroup | bool | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.normalize, self.symmetric = temperature, normalize, symmetric
        self.reduction, self.group = reduction, group

    def forward(self, query: Tensor, key: Tensor, log_q: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        return functional.info_nce(
            query,
            key,
            temperature=self.temperature,
            normalize=self.normalize,
            symmetric=self.symmetric,
            log_q=log_q,
            ids=ids,
            reduction=self.reduction,
            group=self.group,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, normalize={self.normalize}, symmetric={self.symmetric}, "
            f"reduction={self.reduction!r}" + _group_repr(self.group)
        )


class MongeGap(torch.nn.Module):
    """The Monge gap of a map: by how much it moves points at a higher cost than is needed to move them to the same
    places. To be added to a loss that fits the map to its targets.

    Formula, arguments, shapes, dtypes, errors and gradients: :func:`pyreg.functional.monge_gap`.

    Example:
        >>> gap = pyreg.nn.MongeGap(epsilon=0.1)
        >>> model, x = torch.nn.Linear(2, 2), torch.randn(64, 2)
        >>> gap(x, model(x)).backward()
    """

    def __init__(
        self,
        *,
        epsilon: float | None = None,
        relative_epsilon: float | None = None,
        cost: CostName | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
        max_iter: int = 2000,
        tol: float = 1e-3,
        epsilon_scaling: float | None = None,
        streaming: bool | None = None,
    ) -> None:
        super().__init__()
        self.epsilon, self.relative_epsilon, self.cost = epsilon, relative_epsilon, cost
        self.max_iter, self.tol, self.epsilon_scaling, self.streaming = max_iter, tol, epsilon_scaling, streaming

    def forward(self, source: Tensor, mapped: Tensor) -> Tensor:
        return functional.monge_gap(
            source,
            mapped,
            epsilon=self.epsilon,
            relative_epsilon=self.relative_epsilon,
            cost=self.cost,
            max_iter=self.max_iter,
            tol=self.tol,
            epsilon_scaling=self.epsilon_scaling,
            streaming=self.streaming,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        cost = self.cost if isinstance(self.cost, str) else getattr(self.cost, "__name__", type(self.cost).__name__)
        return (
            f"epsilon={self.epsilon}, relative_epsilon={self.relative_epsilon}, cost={cost!r}, "
            f"max_iter={self.max_iter}, tol={self.tol}, epsilon_scaling={self.epsilon_scaling}"
        )


def _group_repr(group: dist.ProcessGroup | bool | None) -> str:
    """Said where there is one."""
    return "" if group is None else f", group={'default' if group is True else group}"


class SamplesLoss(torch.nn.Module):
    r"""The Sinkhorn loss between samples of geomloss, in place of its class of that name, whose constructor and values
    it has.

    .. code-block:: text

        C_ij = |x_i - y_j| (p = 1), |x_i - y_j|^2 / 2 (p = 2)        eps = blur^p,  rho = reach^p
        OT(x, y) = min_P  <P, C> + eps KL(P | a b^T) + rho KL(P 1 | a) + rho KL(P^T 1 | b)
        loss = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + eps / 2 (sum a - sum b)^2       debias
        loss = OT(x, y)                                                                 otherwise

    as far as one iteration at each epsilon from ``diameter^p`` down to ``blur^p``, by factors of ``scaling^p``, finds
    them. No matrix of costs is held beyond 256 MB, whatever the backend.

    Where gradients of second order, a tolerance or a warning of what has not converged are wanted, use
    :func:`pyreg.functional.sinkhorn_divergence`; for the plan :func:`pyreg.functional.sinkhorn_points`.

    Args:
        loss: ``"sinkhorn"``.
        p: 1 or 2.
        blur: above 0, the scale that is to be told apart.
        reach: above 0, the scale of the largest displacement; None: the marginals must hold.
        diameter: above 0, where the scales begin; None: that of the box around all points, to read which waits for a
            GPU.
        scaling: between 0 and 1, the factor between two scales.
        debias: whether the two terms of the samples with themselves are subtracted.
        potentials: whether the loss's potentials are returned in its place.
        truncate, verbose, backend: accepted, and without meaning: there is one exact way.
        cost, kernel, cluster_scale: None.
        exact_gradient: of no meaning without ``reach``. With it, geomloss's gradient by x and y is
            ``(rho + eps / 2) / (rho + eps)`` of the loss's own, and so is this one; True gives that of the loss.

    Shape:
        Called as ``(x, y)`` or ``(a, x, b, y)`` with x ``[n, d]`` or ``[B, n, d]`` and weights a ``[n]``, ``[n, 1]``,
        ``[B, n]`` or ``[B, n, 1]``, 1 / n by default; y and b likewise, with m. Returns a number or ``[B]``; with
        ``potentials`` ``(F, G)`` of the weights' shapes. float64, float32, or bfloat16 and float16 as float32.

    Gradient:
        With respect to x, y and the weights, as geomloss has it: through the last iteration alone. Of first order.
        Potentials have gradients in points of weights above 0.

    Raises:
        ValueError, TypeError: options and shapes that do not fit; the message says what was expected, or what to use
            instead. Weights that are negative, NaN or infinite, of the CPU or where ``PYREG_CHECKS=1`` asks for it.

    Source: Feydy, Sejourne, Vialard, Amari, Trouve, Peyre, "Interpolating between Optimal Transport and MMD using
    Sinkhorn Divergences", AISTATS 2019, arXiv 1810.08278; geomloss 0.3.1.

    Example:
        >>> loss = pyreg.nn.SamplesLoss("sinkhorn", p=2, blur=0.05)
        >>> loss(torch.rand(100, 3, requires_grad=True), torch.rand(120, 3)).backward()
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: object = None,
        kernel: object = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
        *,
        exact_gradient: bool = False,
    ) -> None:
        super().__init__()
        samples_loss.refuse_unknown(loss, cost, kernel, cluster_scale, backend)
        options = samples_loss.checked(p, blur, reach, diameter, scaling, debias)
        check_flag("SamplesLoss", "potentials", potentials)
        self.loss, self.p, self.blur, self.reach, self.diameter = loss, options.p, blur, reach, diameter
        self.scaling, self.truncate, self.cost, self.kernel, self.cluster_scale = scaling, truncate, None, None, None
        self.debias, self.potentials, self.verbose, self.backend = debias, potentials, verbose, backend
        self.exact_gradient = exact_gradient

    # To type checkers the potentials are Any, so that a loss is called without a question which of both it returns.
    def forward(self, *args: Tensor) -> Tensor | Any:
        options = samples_loss.checked(self.p, self.blur, self.reach, self.diameter, self.scaling, self.debias)
        return samples_loss.samples_loss(args, options, self.potentials, self.exact_gradient)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return (
            f"p={self.p}, blur={self.blur}, reach={self.reach}, diameter={self.diameter}, scaling={self.scaling}, "
            f"debias={self.debias}" + (", potentials=True" if self.potentials else "")
        )


class ProgressivePseudoLabels(torch.nn.Module):
    r"""Pseudo-labels of a growing part of the samples, for deep imbalanced clustering by self-labelling.

    .. code-block:: text

        t    = min(step / ramp_steps, 1)
        mass = start_mass + (end_mass - start_mass) exp(-5 (1 - t)^2)

    A call in training mode is a step: it gives the labels of a batch at the mass of now, then remembers the batch. In
    evaluation mode a call changes nothing. Labels are those of :func:`pyreg.functional.progressive_partial_transport`
    or, with a semantic weight, of :func:`~pyreg.functional.semantic_partial_transport` with the weight times ``1 -
    mass``: as more samples take part, what is alike counts for less.

    Balance between classes is a matter of many samples. With a memory bank a batch is labelled together with the
    logits, and features, of the ``bank_size`` samples before it, as they were then. While batch and bank have fewer
    samples than there are classes nothing takes part: all labels are 0.

    Args:
        num_classes: k, at least 1.
        ramp_steps: how many steps the mass grows for, at least 1.
        start_mass, end_mass: in (0, 1].
        epsilon, gamma, prior, max_iter, tol: as of :func:`pyreg.functional.progressive_partial_transport`. The prior is
            a buffer.
        semantic_weight: at least 0; above it, calls take features.
        mm_iter, mm_tol: as of :func:`pyreg.functional.semantic_partial_transport`.
        bank_size: samples that are remembered; 0: none.
        feature_dim: d; needed where there are a bank and a semantic weight.
        device, dtype: of the bank; that of the logits and features that are passed.

    Shape:
        ``logits``: ``[n, k]``. ``features``: ``[n, d]``, whose Gram matrix is the similarity; normalise them for
        cosines. Labels: ``[n, k]``, those of the batch alone; float64 for float64 logits, else float32.

    The state, saved with the state dict, is the bank and the number of steps, in plain integers: no call waits for a
    GPU because of it. In training the mass is another number in each call, for which a compiled function would be
    compiled anew: leave the labels out of what ``torch.compile`` is given. An exported program has the state of its
    export.

    Raises:
        ValueError, TypeError: options and inputs that do not fit; the message says what was expected.

    Source: as of :func:`pyreg.functional.progressive_partial_transport`.

    Example:
        >>> labelling = pyreg.nn.ProgressivePseudoLabels(10, ramp_steps=1000, bank_size=512)
        >>> model = torch.nn.Linear(32, 10)
        >>> weak, strong = torch.randn(64, 32), torch.randn(64, 32)
        >>> labels = labelling(model(weak))
        >>> (-(labels * model(strong).log_softmax(1)).sum() / labels.sum()).backward()
    """

    prior: Tensor | None
    bank_logits: Tensor | None
    bank_features: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        ramp_steps: int,
        start_mass: float = 0.1,
        end_mass: float = 1.0,
        epsilon: float = 0.1,
        gamma: float = 1.0,
        prior: Tensor | None = None,
        semantic_weight: float = 0.0,
        mm_iter: int = 10,
        mm_tol: float = 1e-6,
        bank_size: int = 0,
        feature_dim: int | None = None,
        max_iter: int = 1000,
        tol: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        operator = type(self).__name__
        self.num_classes = _check_integer(operator, "num_classes", num_classes, 1)
        self.ramp_steps = _check_integer(operator, "ramp_steps", ramp_steps, 1)
        self.start_mass = check_mass(operator, "start_mass", start_mass)
        self.end_mass = check_mass(operator, "end_mass", end_mass)
        self.semantic_weight = check_number(operator, "semantic_weight", semantic_weight, 0, or_equal=True)
        self.bank_size = _check_integer(operator, "bank_size", bank_size, 0)
        if feature_dim is not None:
            feature_dim = _check_integer(operator, "feature_dim", feature_dim, 1)
        elif self.bank_size > 0 and self.semantic_weight > 0:
            raise ValueError(
                f"{operator}: expected feature_dim with a memory bank and a semantic_weight above 0, got None; it is d "
                "of the features [n, d]"
            )
        self.feature_dim = feature_dim
        self.epsilon, self.gamma, self.max_iter, self.tol = epsilon, gamma, max_iter, tol
        self.mm_iter, self.mm_tol = mm_iter, mm_tol
        self.register_buffer("prior", None if prior is None else prior.detach().clone())

        def bank(width: int) -> Tensor | None:
            return torch.zeros(self.bank_size, width, device=device, dtype=dtype) if self.bank_size > 0 else None

        self.register_buffer("bank_logits", bank(self.num_classes))
        self.register_buffer("bank_features", bank(feature_dim) if feature_dim and self.semantic_weight > 0 else None)
        self._steps = self._remembered = 0  # of training; samples ever, of which the bank has the last

    @property
    def steps(self) -> int:
        """Calls in training mode so far."""
        return self._steps

    @property
    def mass(self) -> float:
        """The part of all mass that the next call transports."""
        t = min(self._steps / self.ramp_steps, 1.0)
        return self.start_mass + (self.end_mass - self.start_mass) * math.exp(-5 * (1 - t) ** 2)

    @property
    def bank_count(self) -> int:
        """Samples in the bank."""
        return min(self._remembered, self.bank_size)

    def forward(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        self._check(logits, features)
        logits = logits.detach()
        features = features.detach() if features is not None and self.semantic_weight > 0 else None
        labels = self._labels(self._with_bank(logits, self.bank_logits), self._with_bank(features, self.bank_features))
        labels = labels[: logits.shape[0]]
        if self.training:
            self._remember(logits, features)
            self._steps += 1
        return labels

    if TYPE_CHECKING:
        __call__ = forward

    def _labels(self, logits: Tensor, features: Tensor | None) -> Tensor:
        if logits.shape[0] < self.num_classes:
            return logits.new_zeros(logits.shape, dtype=accumulate_dtype(logits.dtype))
        options: dict[str, Any] = {
            **{"mass": self.mass, "epsilon": self.epsilon, "gamma": self.gamma, "prior": self.prior},
            **{"max_iter": self.max_iter, "tol": self.tol},
        }
        semantic_weight = self.semantic_weight * (1 - self.mass)
        if features is None or semantic_weight == 0:
            return functional.progressive_partial_transport(logits, **options)
        return functional.semantic_partial_transport(
            logits,
            features=features,
            semantic_weight=semantic_weight,
            mm_iter=self.mm_iter,
            mm_tol=self.mm_tol,
            **options,
        )

    def _with_bank(self, rows: Any, bank: Tensor | None) -> Any:
        if rows is None or bank is None or self.bank_count == 0:
            return rows
        return torch.cat([rows, bank[: self.bank_count]])

    def _remember(self, logits: Tensor, features: Tensor | None) -> None:
        """The last rows of the batch, in place of the oldest."""
        for rows, bank in ((logits, self.bank_logits), (features, self.bank_features)):
            if rows is None or bank is None:
                continue
            rows = rows[-self.bank_size :]
            first = (self._remembered + len(logits) - len(rows)) % self.bank_size
            before_end = min(len(rows), self.bank_size - first)
            bank[first : first + before_end] = rows[:before_end]
            bank[: len(rows) - before_end] = rows[before_end:]
        self._remembered += len(logits)

    def _check(self, logits: Tensor, features: Tensor | None) -> None:
        operator = type(self).__name__
        expected: list[tuple[str, Tensor | None, int | None, Tensor | None]] = [
            ("logits", logits, self.num_classes, self.bank_logits)
        ]
        if self.semantic_weight > 0:
            if features is None:
                raise ValueError(f"{operator}: expected features [n, d] with a semantic_weight above 0, got None")
            expected.append(("features", features, self.feature_dim, self.bank_features))
        for name, rows, width, bank in expected:
            if not isinstance(rows, Tensor):
                raise TypeError(f"{operator}: expected {name} to be a tensor, got {type(rows).__name__}")
            fits = rows.dim() == 2 and rows.shape[0] == logits.shape[0] and (width is None or rows.shape[1] == width)
            if not fits:
                size = "n" if name == "logits" else str(len(logits))
                raise ValueError(
                    f"{operator}: expected {name} of shape [{size}, {width or 'd'}], got {list(rows.shape)}"
                )
            if bank is not None and (rows.dtype != bank.dtype or rows.device != bank.device):
                raise TypeError(
                    f"{operator}: expected {name} of the memory bank's dtype {bank.dtype} on {bank.device}, got "
                    f"{rows.dtype} on {rows.device}; construct the module with dtype= and device=, or move it by .to()"
                )

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self._steps, "remembered": self._remembered}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._steps, self._remembered = state["steps"], state["remembered"]

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, ramp_steps={self.ramp_steps}, start_mass={self.start_mass}, "
            f"end_mass={self.end_mass}, epsilon={self.epsilon}, gamma={self.gamma}, "
            f"semantic_weight={self.semantic_weight}, bank_size={self.bank_size}"
        )


def _check_integer(operator: str, name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{operator}: expected {name} to be an integer >= {least}, got {value!r}")
    return value


class WeightCompander(torch.nn.Module):
    r"""A weight as a saturating function of what is trained, for :mod:`torch.nn.utils.parametrize`.

    .. code-block:: text

        w = Psi(v) = a f(v / b),    f: arctan, arsinh or erf

    The parameter that the optimizer sees becomes ``v``; it is found from the weight that was there by the inverse of
    ``Psi``, as is every weight that is assigned later. Formula, gradients and dtypes:
    :func:`pyreg.functional.weight_compander`. For all weights of a model: :func:`pyreg.compand`.

    Args:
        a, b: numbers other than 0, or tensors that hold one value for the whole weight or ``[C]``, one for each slice
            of its dimension 0. Numbers take torch's default dtype, tensors are copied as they are.
        learnable: whether ``a`` and ``b`` are parameters, or buffers.
        kind: ``"arctan"`` (``|w| < |a| pi / 2``), ``"arsinh"`` (any ``w``) or ``"erf"`` (``|w| < |a|``).
        clamp: brings weights beyond that range to its border, where they would be an error.

    Shape:
        ``v`` and ``w``: any; float64, float32, bfloat16 or float16.

    Raises:
        ValueError: an unknown ``kind``; ``a`` or ``b`` zero, infinite or NaN; a weight out of range.
        TypeError: ``a`` or ``b`` neither a number nor a floating tensor.

    Source: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", arXiv
    2306.16993.

    Example:
        >>> layer = torch.nn.Linear(8, 4)
        >>> compander = pyreg.nn.WeightCompander(a=0.5, b=1.0)
        >>> _ = torch.nn.utils.parametrize.register_parametrization(layer, "weight", compander)
        >>> bool((layer.weight.abs() < 0.5 * torch.pi / 2).all())
        True
    """

    a: Tensor
    b: Tensor

    def __init__(
        self,
        a: Tensor | float = 0.5,
        b: Tensor | float = 1.0,
        learnable: bool = True,
        kind: Kind = "arctan",
        clamp: bool = False,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"WeightCompander: expected kind to be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        for name, value in (("a", a), ("b", b)):
            constant = compander_constant("WeightCompander", name, value)
            if learnable:
                self.register_parameter(name, torch.nn.Parameter(constant))
            else:
                self.register_buffer(name, constant)
        self.kind, self.clamp = kind, clamp

    def forward(self, v: Tensor) -> Tensor:
        return functional.weight_compander(v, self.a, self.b, self.kind)

    if TYPE_CHECKING:
        __call__ = forward

    def right_inverse(self, w: Tensor) -> Tensor:
        """The ``v`` that gives the weight ``w``."""
        return functional.weight_compander_inverse(w, self.a, self.b, self.kind, self.clamp)

    def extra_repr(self) -> str:
        learnable = isinstance(self.a, torch.nn.Parameter)
        return f"kind={self.kind!r}, learnable={learnable}" + (", clamp=True" if self.clamp else "")


def compander_constant(operator: str, name: str, value: Tensor | float, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of ``a`` or ``b`` as a tensor, its values checked; a number in the dtype, torch's default by default."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{operator}: expected {name} to be a number or a tensor, got {type(value).__name__}")
    constant = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=dtype)
    if not constant.is_floating_point():
        raise TypeError(f"{operator}: expected {name} to be floating, got {constant.dtype}; convert it with .float()")
    if constant.dim() > 1 or constant.numel() == 0:
        raise ValueError(
            f"{operator}: expected {name} to hold one value or [C], one for each slice of the weight's dimension 0, "
            f"got shape {list(constant.shape)}"
        )
    if not constant.is_meta and not bool((constant.isfinite() & (constant != 0)).all()):
        wrong = constant[~constant.isfinite() | (constant == 0)][0].item() if constant.dim() else constant.item()
        raise ValueError(
            f"{operator}: expected {name} to be finite and other than 0, got {wrong}; w = a f(v / b) would not depend "
            "on v, or be NaN"
        )
    return constant
