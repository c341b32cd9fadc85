"""Optimizers, named as in :mod:`torch.optim`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import ParamsT

from pyreg.nn import WeightCompander
from pyreg.ops._options import DecayOn
from pyreg.ops.orthograd import orthogonalize_gradients_
from pyreg.ops.weight_compander import rescale_steps_, to_weight_gradients_

__all__ = ["CompandedOptimizer", "OrthoGrad", "orthogonalize_gradients_"]


class _Wrapper(Optimizer):
    """An optimizer whose steps are another's, with something done to the gradients before or to the parameters after.

    Groups, state and defaults are the base optimizer's own.
    """

    base_optimizer: Optimizer
    _own: tuple[str, ...] = ("base_optimizer",)  # attributes that a copy takes with it
    _example: str  # for errors: how it is called
    _not_differentiable: str  # for errors: what is done to gradients or parameters

    def __init__(self, params: ParamsT, base_optimizer_cls: Callable[..., Optimizer], base_kwargs: Any) -> None:
        if not (isinstance(base_optimizer_cls, type) and issubclass(base_optimizer_cls, Optimizer)):
            raise TypeError(
                f"{type(self).__name__}: expected base_optimizer_cls to be a subclass of torch.optim.Optimizer, got "
                f"{base_optimizer_cls!r}; pass the class and its arguments, as in {self._example}"
            )
        base_optimizer = base_optimizer_cls(params, **base_kwargs)
        for group in base_optimizer.param_groups:
            self._check_group(group)
        # Sets up hooks and profiling as Optimizer.__init__ does, which would also make groups and state of its own.
        self.__setstate__({"base_optimizer": base_optimizer})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes the base optimizer's step.

        Args:
            closure: evaluates the loss and its gradients. The base optimizer calls it as always, with gradients
                enabled.

        Returns:
            What the closure returned; None without one.
        """
        if closure is None:
            self._before_step(first=True)
            self.base_optimizer.step()
            self._after_step()
            return None
        first = True

        def evaluate() -> float:
            nonlocal first
            with torch.enable_grad():
                loss = closure()
            self._before_step(first)
            first = False
            return loss

        loss = self.base_optimizer.step(evaluate)
        self._after_step()
        return loss

    def _before_step(self, first: bool) -> None:
        """What is done to the gradients each time that there are new ones; ``first``: for the first time in a step."""

    def _after_step(self) -> None:
        """What is done to the parameters that the base optimizer has changed."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with options of its own to the base optimizer."""
        self._check_group(param_group)
        self.base_optimizer.add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        if group.get("differentiable"):
            raise ValueError(
                f"{type(self).__name__}: expected differentiable=False, got True: {self._not_differentiable} not "
                "recorded for autograd; leave differentiable out"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" in state:
            super().__setstate__(state)
        else:  # from load_state_dict: groups and state
            self.base_optimizer.__setstate__(state)


class OrthoGrad(_Wrapper):
    r"""Any optimizer, on gradients that are made orthogonal to the weights.

    .. code-block:: text

        g_perp = g - (w.g / (w.w + 1e-30)) w
        g'     = g_perp |g| / (|g_perp| + 1e-30)

    for each parameter tensor; then the base optimizer steps with ``g'``, which takes the place of ``param.grad``. Rules
    for dtypes, zero weights and parallel gradients: :func:`orthogonalize_gradients_`. Weight decay is the base
    optimizer's and comes after the projection.

    ``param_groups``, ``state`` and ``defaults`` are the base optimizer's own, so learning-rate schedulers,
    ``torch.amp.GradScaler`` (with ``unscale_`` before gradient clipping, as ever), ``add_param_group`` and per-group
    options work as they do without OrthoGrad, and ``state_dict`` has the base optimizer's layout: checkpoints load
    from one into the other.

    Args:
        params: parameters or parameter groups, as the base optimizer takes them.
        base_optimizer_cls: the class of the optimizer that takes the step.
        **base_kwargs: its arguments: ``lr``, ``weight_decay``, ``foreach``, ``fused``, ``maximize``, ...

    Attributes:
        base_optimizer: the optimizer that takes the step.

    Raises:
        TypeError: ``base_optimizer_cls`` is no subclass of ``torch.optim.Optimizer``.
        ValueError: ``differentiable=True``: the projection has no gradient.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = pyreg.optim.OrthoGrad(model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        >>> model(torch.randn(16, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    _example = "OrthoGrad(params, torch.optim.AdamW, lr=1e-3)"
    _not_differentiable = "the projection of the gradients is"

    def __init__(self, params: ParamsT, base_optimizer_cls: Callable[..., Optimizer] = SGD, **base_kwargs: Any) -> None:
        super().__init__(params, base_optimizer_cls, base_kwargs)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Projects the gradients, then takes the base optimizer's step.

        Args:
            closure: evaluates the loss and its gradients. The base optimizer calls it as always, with gradients
                enabled, and each evaluation is projected before it goes on: once a step for most optimizers; for
                :class:`torch.optim.LBFGS`, which evaluates several times a step, every time.

        Returns:
            What the closure returned; None without one.
        """
        return super().step(closure)

    def _before_step(self, first: bool) -> None:
        orthogonalize_gradients_([param for group in self.param_groups for param in group["params"]])


class CompandedOptimizer(_Wrapper):
    r"""Any optimizer, on the weights ``w`` of a companded model where it would see the trained ``v``.

    .. code-block:: text

        dL/dw  = dL/dv / Psi'(v)                       takes the place of v.grad
        v_new  = v + Psi'(v) (step of the base optimizer on dL/dw)

    for each weight ``w = Psi(v)`` that :func:`pyreg.compand` has made. An adaptive optimizer divides gradients by their
    size, and so would undo on ``dL/dv`` what the compander is for: that large weights learn slowly. This rule, the
    paper's for Adam, gives it ``dL/dw`` for its moments and scales the finished step. With plain SGD it is plain SGD.
    Parameters that are not companded, learned ``a`` and ``b`` too, take the base optimizer's step as it is.

    ``param_groups``, ``state``, ``defaults`` and the layout of ``state_dict`` are the base optimizer's own; schedulers,
    ``torch.amp.GradScaler``, ``add_param_group`` and per-group options work as they do with it. After a step ``v.grad``
    holds ``dL/dw``: zero it before the next backward, as ever.

    Args:
        params: parameters or parameter groups, as the base optimizer takes them: ``model.parameters()``, or some.
            Groups may have ``decay`` and ``decay_on`` of their own.
        model: the companded model. Its companded weights are looked up in every step; after :func:`pyreg.decompand`
            there are none, and steps are the base optimizer's.
        base_optimizer_cls: the class of the optimizer that takes the step: one that evaluates a closure once.
        decay: the loss gains ``decay * sum w^2`` (or ``v^2``) over the companded weights of ``params``; the
            ``weight_decay`` of ``torch.optim.SGD`` is twice that number.
        decay_on: ``"w"`` (the paper's choice for fixed a, b) or ``"v"`` (for learned ones).
        **base_kwargs: the base optimizer's arguments: ``lr``, ``betas``, ``foreach``, ``fused``, ``maximize``, ...
            Its own ``weight_decay`` has to be 0 in groups with companded weights; give the others a group of their own.

    Attributes:
        base_optimizer: the optimizer that takes the step.

    A learned ``a`` or ``b`` in another optimizer has to be stepped after this one: gradients are those of the values in
    the forward. The paper trains them by plain SGD: ``torch.optim.SGD(companding.constants, lr=...)``.

    Raises:
        TypeError: ``base_optimizer_cls`` is no subclass of ``torch.optim.Optimizer``; ``model`` is no module; a sparse
            gradient.
        ValueError: no parameter is a companded weight of the model; ``decay`` or ``decay_on`` is none; a base
            optimizer's ``weight_decay``; ``differentiable=True``.
        RuntimeError: the base optimizer evaluates the closure more than once in a step (:class:`torch.optim.LBFGS`).

    Source: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", arXiv
    2306.16993.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> companding = pyreg.compand(model, learnable=False)
        >>> optimizer = pyreg.optim.CompandedOptimizer(model.parameters(), model, torch.optim.Adam, lr=1e-2, decay=1e-4)
        >>> model(torch.randn(16, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    _own = ("base_optimizer", "model", "decay", "decay_on")
    _example = "CompandedOptimizer(params, model, torch.optim.Adam, lr=1e-3)"
    _not_differentiable = "the rescaling of gradients and steps is"

    def __init__(
        self,
        params: ParamsT,
        model: torch.nn.Module,
        base_optimizer_cls: Callable[..., Optimizer] = Adam,
        *,
        decay: float = 0.0,
        decay_on: DecayOn = "w",
        **base_kwargs: Any,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                "CompandedOptimizer: expected model to be the companded torch.nn.Module, got "
                f"{type(model).__name__}; call it as in {self._example}"
            )
        self.model, self.decay, self.decay_on = model, decay, decay_on
        super().__init__(params, base_optimizer_cls, base_kwargs)
        companders = self._companders()
        for group in self.param_groups:
            self._check_weight_decay(group, companders)
        if not any(param in companders for group in self.param_groups for param in group["params"]):
            raise ValueError(
                "CompandedOptimizer: expected params with companded weights of the model, got none; call "
                "pyreg.compand(model) first, and pass model.parameters()"
            )

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes the base optimizer's step on gradients by ``w``, and scales it to one of ``v``.

        Args:
            closure: evaluates the loss and its gradients, once, with gradients enabled.

        Returns:
            What the closure returned; None without one.
        """
        return super().step(closure)

    def _before_step(self, first: bool) -> None:
        if not first:
            raise RuntimeError(
                "CompandedOptimizer: expected a base optimizer that evaluates the closure once a step, got "
                f"{type(self.base_optimizer).__name__}, which takes several steps in one; they cannot be rescaled one "
                "by one"
            )
        companders = self._companders()
        batches: dict[tuple[str, float, str], list[Tensor]] = {}
        for group in self.param_groups:
            self._check_weight_decay(group, companders)
            decay, decay_on = group.get("decay", self.decay), group.get("decay_on", self.decay_on)
            if group.get("maximize"):  # the base optimizer will turn the sign of all that is in the gradient
                decay = -decay
            for param in group["params"]:
                if param in companders and param.grad is not None:
                    batches.setdefault((companders[param].kind, decay, decay_on), []).append(param)
        before: dict[Tensor, Tensor] = {}  # a and b, which may be stepped too
        self._steps.clear()
        for (kind, decay, decay_on), vs in batches.items():
            constants = [(companders[v].a, companders[v].b) for v in vs]
            for constant in (constant for pair in constants for constant in pair):
                if constant not in before:
                    before[constant] = constant.detach().clone() if constant.requires_grad else constant
            a, b = [before[a] for a, _ in constants], [before[b] for _, b in constants]
            to_weight_gradients_([v.grad for v in vs if v.grad is not None], vs, a, b, kind, decay, decay_on)
            self._steps.append((vs, self._copies(vs), a, b, kind))

    @torch.no_grad()
    def _after_step(self) -> None:
        for vs, old_vs, a, b, kind in self._steps:
            rescale_steps_(vs, old_vs, a, b, kind)
        self._steps.clear()

    def _copies(self, vs: list[Tensor]) -> list[Tensor]:
        """The values of the parameters, in memory that is kept from step to step."""
        for v in vs:
            copy = self._old.get(v)
            if copy is None or copy.dtype != v.dtype or copy.device != v.device:
                self._old[v] = torch.empty_like(v, requires_grad=False)
        copies = [self._old[v] for v in vs]
        with torch.no_grad():
            torch._foreach_copy_(copies, vs)
        return copies

    def _companders(self) -> dict[Tensor, WeightCompander]:
        """The compander of each v."""
        weights = (module for module in self.model.modules() if isinstance(module, parametrize.ParametrizationList))
        return {weight.original: weight[0] for weight in weights if isinstance(weight[0], WeightCompander)}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        decay, decay_on = group.get("decay", self.decay), group.get("decay_on", self.decay_on)
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not math.isfinite(decay):
            raise ValueError(f"CompandedOptimizer: expected decay to be a finite number, got {decay!r}")
        if decay_on not in ("w", "v"):
            raise ValueError(f"CompandedOptimizer: expected decay_on to be 'w' or 'v', got {decay_on!r}")

    def _check_weight_decay(self, group: dict[str, Any], companders: dict[Tensor, WeightCompander]) -> None:
        weight_decay = group.get("weight_decay", 0)
        if weight_decay != 0 and any(param in companders for param in group["params"]):
            raise ValueError(
                f"CompandedOptimizer: expected weight_decay=0 in a group with companded weights, got {weight_decay}, "
                f"which {type(self.base_optimizer).__name__} would apply to v and not to w; pass weight_decay=0 and "
                "decay, and the parameters that are not companded in a group of their own"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base_optimizer" in state:
            self._old: dict[Tensor, Tensor] = {}
            self._steps: list[tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], str]] = []
